#include "stiefel/schedule.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>

namespace stella {

void run_queue(const Pool& pool, int64_t tasks, const std::function<void(int64_t)>& task) {
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  auto work = [&](int64_t) {
    try {
      for (int64_t i = next++; i < tasks; i = next++) task(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      next = tasks;
    }
  };
  const int64_t workers = std::min(pool.threads, tasks);
  if (workers <= 1)
    work(0);
  else
    pool.parallel_for(workers, work);
  if (error) std::rethrow_exception(error);
}

namespace {

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Largest first; a matrix with more than half a thread's share of the work has its rows shared.
struct Division {
  std::vector<int64_t> shared, whole;
};

Division divide(const Pool& pool, const std::vector<MatrixView>& matrices, bool two_operands) {
  const IsaKernels& k = kernels();
  std::vector<double> work(matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i)
    work[i] = static_cast<double>(matrices[i].n) * static_cast<double>(matrices[i].r) *
              static_cast<double>(matrices[i].r + 8);
  const double total = std::accumulate(work.begin(), work.end(), 0.0);
  std::vector<int64_t> order(matrices.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  Division division;
  division.whole.reserve(order.size());
  for (const int64_t i : order) {
    const MatrixView& m = matrices[i];
    const bool large = pool.threads > 1 && work[i] * 2.0 * static_cast<double>(pool.threads) > total;
    if (large && m.n >= 2 * k.plan(m.n, m.r, m.storage, two_operands).block_rows)
      division.shared.push_back(i);
    else
      division.whole.push_back(i);
  }
  return division;
}

// gram = sum over blocks of rows of pass(begin, end, block's gram), added in the order of the rows.
void gram_of_blocks(const Pool& pool, int64_t n, int64_t block, int64_t size, double* gram,
                    const std::function<void(int64_t, int64_t, double*)>& pass) {
  const int64_t blocks = blocks_of(n, block);
  std::vector<double> partial(static_cast<size_t>(blocks * size), 0.0);
  run_queue(pool, blocks, [&](int64_t b) { pass(b * block, std::min(n, (b + 1) * block), partial.data() + b * size); });
  std::fill(gram, gram + size, 0.0);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < size; ++i) gram[i] += partial[static_cast<size_t>(b * size + i)];
}

// The outcomes of a list of which nothing was computed: those of non-finite matrices say so. False where all are
// finite.
bool refuse_non_finite(const std::vector<double>& largest, std::vector<Outcome>& outcomes) {
  bool all = true;
  for (const double magnitude : largest) all = all && std::isfinite(magnitude);
  for (size_t i = 0; !all && i < largest.size(); ++i) {
    if (!std::isfinite(largest[i])) outcomes[i].status = Status::non_finite;
    outcomes[i].residual = outcomes[i].drift = std::numeric_limits<double>::quiet_NaN();
  }
  return !all;
}

// The largest finite value of the arithmetic and of a storage.
double largest_of(Storage storage) {
  if (storage == Storage::float64) return std::numeric_limits<double>::max();
  if (storage == Storage::float16) return 65504.0;
  return storage == Storage::bfloat16 ? 0x1.fep127 : std::numeric_limits<float>::max();
}

// Bound on the values of gradient - Y K, K = gradient^T Y, for ||Y||_2^2 <= 4 (a drift of up to 3), and on all sums on
// the way there: |(Y K)_ij| <= ||Y||_2 ||K_j|| with ||K_j|| <= ||Y||_2 ||gradient||_F <= 2 sqrt(n r) max |gradient|.
double riemannian_bound(double largest, int64_t n, int64_t r) {
  return largest * (1.0 + 4.0 * std::sqrt(static_cast<double>(n) * static_cast<double>(r)));
}

}  // namespace

std::vector<Outcome> polar(const Pool& pool, const std::vector<PolarJob>& jobs, Method method) {
  const IsaKernels& k = kernels();
  std::vector<Outcome> outcomes(jobs.size());
  std::vector<MatrixView> matrices;
  matrices.reserve(jobs.size());
  for (const PolarJob& job : jobs) matrices.push_back(job.in);
  Division division = divide(pool, matrices, false);
  for (const int64_t i : division.shared) {
    const PolarJob& job = jobs[i];
    const int64_t n = job.in.n, r = job.in.r, block = k.plan(n, r, job.in.storage, false).block_rows;
    bool done = false;
    if (method == Method::automatic) {
      std::vector<double> gram(r * r), coefficients(r * r);
      gram_of_blocks(pool, n, block, r * r, gram.data(),
                     [&](int64_t b, int64_t e, double* out) { k.polar_gram(job, b, e, out); });
      if (k.polar_solve(job, gram.data(), coefficients.data(), &outcomes[i])) {
        gram_of_blocks(pool, n, block, r * r, gram.data(),
                       [&](int64_t b, int64_t e, double* out) { k.polar_update(job, b, e, coefficients.data(), out); });
        done = k.polar_accept(job, gram.data(), &outcomes[i]);
      }
    }
    if (!done) division.whole.push_back(i);
  }
  run_queue(pool, static_cast<int64_t>(division.whole.size()), [&](int64_t t) {
    const int64_t i = division.whole[t];
    Outcome outcome;  // this thread's own: neighbours in the vector share a cache line
    k.polar(jobs[i], method, &outcome);
    outcomes[i] = outcome;
  });
  return outcomes;
}

std::vector<Outcome> project_retract(const Pool& pool, const std::vector<RetractJob>& jobs, Method method) {
  const IsaKernels& k = kernels();
  std::vector<Outcome> outcomes(jobs.size());
  std::vector<MatrixView> matrices;
  for (const RetractJob& job : jobs) matrices.push_back(job.moved);
  Division division = divide(pool, matrices, true);
  for (const int64_t i : division.shared) {
    const RetractJob& job = jobs[i];
    const int64_t n = job.moved.n, r = job.moved.r, block = k.plan(n, r, job.moved.storage, true).block_rows;
    bool done = false;
    if (method == Method::automatic) {
      std::vector<double> gram(4 * r * r), coefficients(2 * r * r);
      gram_of_blocks(pool, n, block, 4 * r * r, gram.data(),
                     [&](int64_t b, int64_t e, double* out) { k.retract_gram(job, b, e, out); });
      if (k.retract_solve(job, gram.data(), coefficients.data(), &outcomes[i])) {
        run_queue(pool, blocks_of(n, block), [&](int64_t b) {
          k.retract_update(job, b * block, std::min(n, (b + 1) * block), coefficients.data());
        });
        done = true;
      }
    }
    if (!done) division.whole.push_back(i);
  }
  run_queue(pool, static_cast<int64_t>(division.whole.size()), [&](int64_t t) {
    const int64_t i = division.whole[t];
    k.retract(jobs[i], method, &outcomes[i]);
  });
  return outcomes;
}

namespace {

// The largest magnitude of each matrix, infinite where a value is not finite.
std::vector<double> largest_magnitudes(const Pool& pool, const std::vector<MatrixView>& matrices) {
  constexpr int64_t kBlockElements = 1 << 18;
  const IsaKernels& k = kernels();
  struct Piece {
    int64_t matrix, begin, end;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const MatrixView& m = matrices[i];
    const int64_t rows = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, m.r));
    for (int64_t b = 0; b < m.n; b += rows) pieces.push_back({static_cast<int64_t>(i), b, std::min(m.n, b + rows)});
  }
  std::vector<double> of_piece(pieces.size(), 0.0);
  // From the last to the first: what is worked on first afterwards is then still in the last-level cache.
  const int64_t count = static_cast<int64_t>(pieces.size());
  run_queue(pool, count, [&](int64_t t) {
    const Piece& p = pieces[count - 1 - t];
    of_piece[count - 1 - t] = k.largest_magnitude(matrices[p.matrix], p.begin, p.end);
  });
  std::vector<double> largest(matrices.size(), 0.0);
  for (size_t t = 0; t < pieces.size(); ++t)
    largest[pieces[t].matrix] = std::max(largest[pieces[t].matrix], of_piece[t]);
  return largest;
}

// Tries the gradients that are too large to be bounded, without writing anything; false when one overflows.
bool gradients_fit(const Pool& pool, const std::vector<GradientJob>& jobs, const std::vector<double>& largest,
                   std::vector<Outcome>& outcomes) {
  const IsaKernels& k = kernels();
  std::vector<int64_t> doubtful;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const MatrixView& m = jobs[i].gradient;
    if (!(riemannian_bound(largest[i], m.n, m.r) <= largest_of(m.storage))) doubtful.push_back(i);
  }
  run_queue(pool, static_cast<int64_t>(doubtful.size()), [&](int64_t t) {
    GradientJob job = jobs[doubtful[t]];
    job.snapshot.data = nullptr;
    std::vector<double> gram(2 * job.gradient.r * job.gradient.r, 0.0);
    k.gradient_gram(job, 0, job.gradient.n, gram.data());
    k.gradient_accept(job, gram.data(), false, &outcomes[doubtful[t]]);
  });
  bool fit = true;
  for (const Outcome& outcome : outcomes) fit = fit && outcome.status != Status::overflow;
  std::vector<char> tried(jobs.size(), 0);
  for (const int64_t i : doubtful) tried[i] = 1;
  for (size_t i = 0; !fit && i < jobs.size(); ++i)
    if (!tried[i]) outcomes[i].drift = std::numeric_limits<double>::quiet_NaN();
  return fit;
}

// Whether the moments of a step can overflow: v takes the square of a value bounded as above, with a known K by
// ||Y||_2 ||K||_F. Both moments are means of what they were and of what is new, so that half their range will do.
bool moments_bounded(const AdamwJob& job, double largest) {
  const MatrixView& m = job.factor;
  double bound = riemannian_bound(largest, m.n, m.r);
  if (job.coupling) {
    double sum = 0.0;
    for (int64_t i = 0; i < m.r * m.r; ++i) sum += job.coupling[i] * job.coupling[i];
    bound = largest + 2.0 * std::sqrt(sum);
  }
  return bound * bound <= 0.5 * largest_of(m.storage) && bound <= 0.5 * largest_of(m.storage);
}

// Tries the steps whose moments are not bounded, without writing anything: of those that cannot be taken the outcomes
// say why. False when one overflows, and then nothing was computed of the others.
bool steps_fit(const Pool& pool, const std::vector<AdamwJob>& jobs, const std::vector<double>& largest,
               std::vector<Outcome>& outcomes) {
  const IsaKernels& k = kernels();
  std::vector<int64_t> doubtful;
  for (size_t i = 0; i < jobs.size(); ++i)
    if (!moments_bounded(jobs[i], largest[i])) doubtful.push_back(i);
  run_queue(pool, static_cast<int64_t>(doubtful.size()),
            [&](int64_t t) { k.adamw_fits(jobs[doubtful[t]], &outcomes[doubtful[t]]); });
  bool fit = true;
  for (const Outcome& outcome : outcomes) fit = fit && outcome.status != Status::overflow;
  for (Outcome& outcome : outcomes)
    if (!fit && outcome.status == Status::ok)
      outcome.residual = outcome.drift = std::numeric_limits<double>::quiet_NaN();
  return fit;
}

}  // namespace

std::vector<Outcome> riemannian_gradient(const Pool& pool, const std::vector<GradientJob>& jobs) {
  const IsaKernels& k = kernels();
  std::vector<Outcome> outcomes(jobs.size());
  std::vector<MatrixView> matrices;
  for (const GradientJob& job : jobs) matrices.push_back(job.gradient);
  const std::vector<double> largest = largest_magnitudes(pool, matrices);
  if (refuse_non_finite(largest, outcomes) || !gradients_fit(pool, jobs, largest, outcomes)) return outcomes;

  const Division division = divide(pool, matrices, true);
  for (const int64_t i : division.shared) {
    const GradientJob& job = jobs[i];
    const int64_t n = job.gradient.n, r = job.gradient.r, block = k.plan(n, r, job.gradient.storage, true).block_rows;
    std::vector<double> gram(2 * r * r);
    gram_of_blocks(pool, n, block, 2 * r * r, gram.data(),
                   [&](int64_t b, int64_t e, double* out) { k.gradient_gram(job, b, e, out); });
    if (!k.gradient_accept(job, gram.data(), true, &outcomes[i])) continue;
    run_queue(pool, blocks_of(n, block),
              [&](int64_t b) { k.gradient_update(job, b * block, std::min(n, (b + 1) * block), gram.data()); });
  }
  run_queue(pool, static_cast<int64_t>(division.whole.size()), [&](int64_t t) {
    const int64_t i = division.whole[t];
    k.gradient(jobs[i], &outcomes[i]);
  });
  return outcomes;
}

namespace {

// Threads take the jobs in turn, so that the one a round later is this thread's.
void announce(const AdamwJob& next, AdamwJob& job) {
  const auto gapless = [](const MatrixView& m) {
    return (m.col_stride == 1 && m.row_stride == m.r) || (m.row_stride == 1 && m.col_stride == m.n);
  };
  if (!gapless(next.factor) || !gapless(next.gradient)) return;
  job.upcoming_factor = next.factor.data;
  job.upcoming_gradient = next.gradient.data;
  job.upcoming_bytes = next.factor.n * next.factor.r * bytes_of(next.factor.storage);
}

}  // namespace

std::vector<Outcome> adamw(const Pool& pool, const std::vector<AdamwJob>& jobs) {
  const IsaKernels& k = kernels();
  std::vector<Outcome> outcomes(jobs.size());
  std::vector<MatrixView> matrices;
  for (const AdamwJob& job : jobs) matrices.push_back(job.gradient);
  const std::vector<double> largest = largest_magnitudes(pool, matrices);
  if (refuse_non_finite(largest, outcomes) || !steps_fit(pool, jobs, largest, outcomes)) return outcomes;

  const auto stays = [&](int64_t i) { return outcomes[i].status != Status::ok; };
  const Division division = divide(pool, matrices, true);
  for (const int64_t i : division.shared) {
    if (stays(i)) continue;
    const AdamwJob& job = jobs[i];
    const int64_t n = job.factor.n, r = job.factor.r, block = k.plan(n, r, job.factor.storage, true).block_rows;
    std::vector<double> coupling(r * r), gram(4 * r * r), coefficients(2 * r * r);
    if (job.coupling) {
      for (int64_t a = 0; a < r; ++a)
        for (int64_t b = 0; b < r; ++b) coupling[b * r + a] = job.coupling[a * r + b];
    } else {
      gram_of_blocks(pool, n, block, r * r, coupling.data(),
                     [&](int64_t b, int64_t e, double* out) { k.adamw_coupling(job, b, e, out); });
    }
    const std::unique_ptr<char[]> steps(new char[k.adamw_steps_bytes(job)]);
    gram_of_blocks(pool, n, block, 4 * r * r, gram.data(), [&](int64_t b, int64_t e, double* out) {
      k.adamw_step(job, b, e, coupling.data(), steps.get(), out);
    });
    if (k.adamw_solve(job, gram.data(), coefficients.data(), &outcomes[i]))
      run_queue(pool, blocks_of(n, block), [&](int64_t b) {
        k.adamw_update(job, b * block, std::min(n, (b + 1) * block), steps.get(), coefficients.data());
      });
    else
      k.adamw_fallback(job, steps.get(), &outcomes[i]);
  }
  const int64_t whole = static_cast<int64_t>(division.whole.size());
  run_queue(pool, whole, [&](int64_t t) {
    const int64_t i = division.whole[t];
    if (stays(i)) return;
    AdamwJob job = jobs[i];
    if (t + pool.threads < whole) announce(jobs[division.whole[t + pool.threads]], job);
    k.adamw(job, &outcomes[i]);
  });
  return outcomes;
}

}  // namespace stella

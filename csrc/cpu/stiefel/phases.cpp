#include "stiefel/phases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace stella {

namespace {

// Rows [begin, end) of the job at `index`: what a thread takes.
struct Piece {
  size_t index;
  int64_t begin, end;
};

// In the order of jobs and rows, so that sums do not depend on the threads.
std::vector<Piece> pieces_of(const std::vector<MatrixView>& matrices) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const MatrixView& m = matrices[i];
    if (m.n == 0 || m.r == 0) continue;
    const int64_t block = kernels().plan(m.n, m.r, m.storage, true).block_rows;
    for (int64_t begin = 0; begin < m.n; begin += block) pieces.push_back({i, begin, std::min(m.n, begin + block)});
  }
  return pieces;
}

void for_pieces(const Pool& pool, const std::vector<MatrixView>& matrices,
                const std::function<void(const Piece&)>& body) {
  const std::vector<Piece> pieces = pieces_of(matrices);
  run_queue(pool, static_cast<int64_t>(pieces.size()), [&](int64_t t) { body(pieces[t]); });
}

// The sum over a job's pieces of `size(r)` values each, added in the order of the rows.
std::vector<std::vector<double>> summed(const Pool& pool, const std::vector<MatrixView>& matrices, int64_t squares,
                                        const std::function<void(const Piece&, double*)>& pass) {
  const std::vector<Piece> pieces = pieces_of(matrices);
  std::vector<std::vector<double>> partial(pieces.size()), sums(matrices.size());
  for (size_t i = 0; i < matrices.size(); ++i) sums[i].assign(squares * matrices[i].r * matrices[i].r, 0.0);
  run_queue(pool, static_cast<int64_t>(pieces.size()), [&](int64_t t) {
    partial[t].assign(sums[pieces[t].index].size(), 0.0);
    pass(pieces[t], partial[t].data());
  });
  for (size_t t = 0; t < pieces.size(); ++t) {
    std::vector<double>& sum = sums[pieces[t].index];
    for (size_t k = 0; k < sum.size(); ++k) sum[k] += partial[t][k];
  }
  return sums;
}

std::vector<double> upper_of(const double* square, int64_t r, int64_t leading) {
  std::vector<double> upper;
  upper.reserve(r * (r + 1) / 2);
  for (int64_t i = 0; i < r; ++i) upper.insert(upper.end(), square + i * leading + i, square + i * leading + r);
  return upper;
}

// Y^T Delta and Delta^T Delta out of the Gram of [Y, Delta].
Blocks blocks_of_gram(const std::vector<double>& gram, int64_t r) {
  const int64_t order = 2 * r;
  Blocks blocks;
  for (int64_t i = 0; i < r; ++i)
    blocks.full.insert(blocks.full.end(), gram.begin() + i * order + r, gram.begin() + (i + 1) * order);
  blocks.upper = upper_of(gram.data() + r * order + r, r, order);
  return blocks;
}

// The Gram of [Y, Delta] of all rows, its upper triangle.
std::vector<double> gram_of(const Blocks& point, const Blocks& step, int64_t r) {
  const int64_t order = 2 * r;
  std::vector<double> gram(order * order, 0.0);
  const double *c = point.upper.data(), *d = step.upper.data();
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i; j < r; ++j) {
      gram[i * order + j] = *c++;
      gram[(r + i) * order + r + j] = *d++;
    }
  for (int64_t i = 0; i < r; ++i) std::copy_n(step.full.data() + i * r, r, gram.data() + i * order + r);
  return gram;
}

template <typename T, typename Job>
std::vector<MatrixView> views(const std::vector<Job>& jobs, T Job::* member) {
  std::vector<MatrixView> found;
  for (const Job& job : jobs) found.push_back(job.*member);
  return found;
}

void copy_rows(const MatrixView& from, const MatrixView& to, int64_t begin, int64_t end) {
  const int64_t bytes = bytes_of(from.storage);
  const bool rows = from.col_stride == 1 && to.col_stride == 1;
  for (int64_t i = begin; i < end; ++i) {
    const char* source = static_cast<const char*>(from.data) + i * from.row_stride * bytes;
    char* target = static_cast<char*>(to.data) + i * to.row_stride * bytes;
    if (rows) {
      std::memcpy(target, source, static_cast<size_t>(from.r * bytes));
      continue;
    }
    for (int64_t j = 0; j < from.r; ++j)
      std::memcpy(target + j * to.col_stride * bytes, source + j * from.col_stride * bytes, static_cast<size_t>(bytes));
  }
}

// Coefficients of the update of all rows, or an outcome that says why there are none. Only sums, rank and storage
// count.
bool solve(const MatrixView& factor, const Blocks& point, const Blocks& step, std::vector<double>& coefficients,
           Outcome* outcome) {
  RetractJob job = {factor, factor, 1.0};
  job.moved.n = 0;  // else the residual of what is stored would be that of this process's rows
  const std::vector<double> gram = gram_of(point, step, factor.r);
  coefficients.assign(2 * factor.r * factor.r, 0.0);
  if (kernels().retract_solve(job, gram.data(), coefficients.data(), outcome)) return true;
  if (kernels().retract_solve_far(job, gram.data(), coefficients.data(), outcome)) return true;
  outcome->status = Status::not_converged;
  outcome->residual = std::numeric_limits<double>::quiet_NaN();
  return false;
}

struct Solved {
  std::vector<std::vector<double>> coefficients;
  std::vector<Outcome> outcomes;
};

Solved solve_all(const Pool& pool, const std::vector<MatrixView>& factors, const std::vector<Blocks>& points,
                 const std::vector<Blocks>& steps) {
  Solved solved;
  solved.coefficients.resize(factors.size());
  solved.outcomes.resize(factors.size());
  run_queue(pool, static_cast<int64_t>(factors.size()), [&](int64_t i) {
    if (factors[i].r > 0) solve(factors[i], points[i], steps[i], solved.coefficients[i], &solved.outcomes[i]);
  });
  return solved;
}

}  // namespace

std::vector<Blocks> gradient_blocks(const Pool& pool, const std::vector<GradientJob>& jobs) {
  const std::vector<MatrixView> matrices = views(jobs, &GradientJob::gradient);
  const auto sums = summed(pool, matrices, 2, [&](const Piece& p, double* gram) {
    kernels().gradient_gram(jobs[p.index], p.begin, p.end, gram);
  });
  std::vector<Blocks> blocks;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const int64_t r = matrices[i].r;
    blocks.push_back({{sums[i].begin(), sums[i].begin() + r * r}, upper_of(sums[i].data() + r * r, r, r)});
  }
  return blocks;
}

std::vector<double> gradient_norms(const Pool& pool, const std::vector<GradientJob>& jobs) {
  const std::vector<MatrixView> matrices = views(jobs, &GradientJob::gradient);
  std::vector<double> largest(jobs.size(), 0.0), norms;
  const std::vector<Piece> pieces = pieces_of(matrices);
  std::vector<double> of_piece(pieces.size());
  run_queue(pool, static_cast<int64_t>(pieces.size()), [&](int64_t t) {
    of_piece[t] = kernels().largest_magnitude(matrices[pieces[t].index], pieces[t].begin, pieces[t].end);
  });
  for (size_t t = 0; t < pieces.size(); ++t) largest[pieces[t].index] = std::max(largest[pieces[t].index], of_piece[t]);
  for (size_t i = 0; i < jobs.size(); ++i) {
    // above the norm, and no further reading of the gradient: at most sqrt(n r) times the largest value
    const double bound =
        largest[i] * std::sqrt(static_cast<double>(matrices[i].n) * static_cast<double>(matrices[i].r));
    norms.push_back(std::isfinite(largest[i]) ? std::min(bound, 1e30) : std::numeric_limits<double>::quiet_NaN());
  }
  return norms;
}

void subtract_blocks(const Pool& pool, const std::vector<GradientJob>& jobs, const std::vector<Blocks>& all) {
  for_pieces(pool, views(jobs, &GradientJob::gradient), [&](const Piece& p) {
    const GradientJob& job = jobs[p.index];
    if (job.snapshot.data) copy_rows(job.factor, job.snapshot, p.begin, p.end);
    kernels().gradient_update(job, p.begin, p.end, all[p.index].full.data());
  });
}

std::vector<Blocks> step_blocks(const Pool& pool, const std::vector<RetractJob>& jobs) {
  const std::vector<MatrixView> matrices = views(jobs, &RetractJob::moved);
  const auto grams = summed(pool, matrices, 4, [&](const Piece& p, double* gram) {
    kernels().retract_gram(jobs[p.index], p.begin, p.end, gram);
  });
  std::vector<Blocks> blocks;
  for (size_t i = 0; i < jobs.size(); ++i) blocks.push_back(blocks_of_gram(grams[i], matrices[i].r));
  return blocks;
}

std::vector<Outcome> retract_rows(const Pool& pool, const std::vector<RetractJob>& jobs,
                                  const std::vector<Blocks>& points, const std::vector<Blocks>& steps) {
  const std::vector<MatrixView> matrices = views(jobs, &RetractJob::moved);
  const Solved solved = solve_all(pool, matrices, points, steps);
  for_pieces(pool, matrices, [&](const Piece& p) {
    if (solved.outcomes[p.index].status == Status::ok)
      kernels().retract_update(jobs[p.index], p.begin, p.end, solved.coefficients[p.index].data());
  });
  return solved.outcomes;
}

namespace {

// What is kept of the steps begins with how they lie, which the factor alone does not tell.
constexpr int64_t kHeader = 64;

}  // namespace

int64_t adamw_kept_bytes(const AdamwJob& job) {
  const int64_t bytes = job.factor.n == 0 || job.factor.r == 0 ? 0 : kernels().adamw_steps_bytes(job);
  return kHeader + (bytes + kHeader - 1) / kHeader * kHeader;
}

std::vector<Blocks> adamw_blocks(const Pool& pool, const std::vector<AdamwJob>& jobs, const std::vector<Blocks>& points,
                                 const std::vector<char*>& kept) {
  const std::vector<MatrixView> matrices = views(jobs, &AdamwJob::factor);
  std::vector<std::vector<double>> couplings(jobs.size());  // Y^T gradient
  for (size_t i = 0; i < jobs.size(); ++i) {
    const int64_t r = matrices[i].r;
    couplings[i].resize(r * r);
    for (int64_t a = 0; a < r; ++a)
      for (int64_t b = 0; b < r; ++b) couplings[i][b * r + a] = points[i].full[a * r + b];
    *kept[i] = matrices[i].n > 0 && kernels().adamw_steps_by_rows(jobs[i]);
  }
  const auto grams = summed(pool, matrices, 4, [&](const Piece& p, double* gram) {
    kernels().adamw_step(jobs[p.index], p.begin, p.end, couplings[p.index].data(), kept[p.index] + kHeader, gram);
  });
  std::vector<Blocks> blocks;
  for (size_t i = 0; i < jobs.size(); ++i) blocks.push_back(blocks_of_gram(grams[i], matrices[i].r));
  return blocks;
}

std::vector<Outcome> adamw_rows(const Pool& pool, const std::vector<MatrixView>& factors,
                                const std::vector<Blocks>& points, const std::vector<Blocks>& steps,
                                const std::vector<char*>& kept) {
  const Solved solved = solve_all(pool, factors, points, steps);
  for_pieces(pool, factors, [&](const Piece& p) {
    if (solved.outcomes[p.index].status != Status::ok) return;
    AdamwJob job = {};
    job.factor = job.gradient = job.first_moment = job.second_moment = factors[p.index];
    if (!*kept[p.index]) job.gradient.row_stride = job.gradient.col_stride = 2;  // strides that no other passes serve
    kernels().adamw_update(job, p.begin, p.end, kept[p.index] + kHeader, solved.coefficients[p.index].data());
  });
  return solved.outcomes;
}

}  // namespace stella

// The orthogonal polar factor of one matrix.
#pragma once

#include "stiefel/passes.h"
#include "stiefel/short_rows.h"
#include "stiefel/svd_polar.h"
#include "stiefel/value_range.h"

namespace stella::STELLA_ISA {
namespace {

// coefficients (r x r) = G^(-1/2) from the Gram's upper triangle.
//
// The residual is bounded (residual.h) where the condition number is. Where that is not, the outcome's residual is
// infinite: it has to be measured on Q.
template <typename T>
bool polar_coefficients(const double* gram, int64_t r, double tolerance, double limit, double* coefficients,
                        Outcome* outcome) {
  Scratch& s = scratch();
  const int64_t leading = square_leading(r);
  double* G = s.square[4].reserve<double>(square_size(r));
  double* R = s.square[5].reserve<double>(square_size(r));
  symmetric_from_upper(gram, r, 0, r, G);
  const SmallResult result = inverse_square_root<T>(G, r, tolerance, R);
  outcome->iterations += result.iterations;
  if (!result.converged || !(result.condition <= limit)) return false;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) coefficients[i * r + j] = R[i * leading + j];
  outcome->residual = result.bounded ? result.residual + product_roundoff<T>(r, result.condition) : __builtin_inf();
  return true;
}

// Neither overflow nor underflow has touched the Gram: its diagonal lies well inside the arithmetic type's range.
template <typename T>
bool gram_in_range(const double* gram, int64_t r) {
  const double high = std::is_same_v<T, float> ? 1e36 : 1e300, low = std::is_same_v<T, float> ? 1e-24 : 1e-240;
  double largest = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    const double g = gram[i * r + i];
    if (!(g <= high)) return false;
    if (g > largest) largest = g;
  }
  return largest >= low;
}

// Adds the Gram matrix of rows [begin, end) to `gram` (r x r): its upper triangle at least.
void gram_of_rows(const MatrixView& view, int64_t begin, int64_t end, double* gram) {
  const int64_t r = view.r;
  if (rows_are_short(view))
    return for_short_row(r, [&](auto width) { gram_of_short_rows<width>(rows_of(view, begin), end - begin, gram); });
  const int64_t chunk = chunk_of_rows(r);
  RowSums sums(r, gram);
  for (int64_t i = begin; i < end; i += chunk) {
    const int64_t rows = end - i < chunk ? end - i : chunk;
    const float* from = rows_of(view, i);
    cross_of_rows(from, view.row_stride, from, view.row_stride, rows, r, true, sums.block(0, 0), r);
    sums.added(rows, i + chunk >= end);
  }
}

// product(first row, rows) for rows [begin, end), a chunk of some hundred values at a time, so that fetching as many of
// `upcoming` before each spreads over the products.
template <typename Product>
STELLA_INLINE void multiply_chunks(int64_t begin, int64_t end, int64_t chunk, int64_t r, const float* upcoming,
                                   Product&& product) {
  for (int64_t i = begin; i < end; i += chunk) {
    const int64_t rows = end - i < chunk ? end - i : chunk;
    if (upcoming) prefetch_rows(upcoming + i * r, rows * r);
    product(i, rows);
  }
}

// Rows [begin, end) of out = in * coefficients (r x r).
template <bool streamed>
void multiply_rows(const MatrixView& in, const MatrixView& out, int64_t begin, int64_t end, const double* coefficients,
                   const float* upcoming) {
  const int64_t r = in.r;
  if (rows_are_short(in) && rows_are_short(out)) {
    for_short_row(r, [&](auto width) {
      const ShortRowProduct<width> product(coefficients);
      multiply_chunks(begin, end, 256 / width, r, upcoming, [&](int64_t i, int64_t rows) {
        product.template operator()<streamed>(rows_of(in, i), rows, rows_of(out, i));
      });
    });
  } else {
    float* blocked = scratch().coefficients.reserve<float>(r * r);
    block_row_coefficients(coefficients, r, blocked);
    multiply_chunks(begin, end, 24, r, upcoming, [&](int64_t i, int64_t rows) {
      const RowTerm term = {rows_of(in, i), in.row_stride, blocked};
      update_rows<streamed>(nullptr, 0, &term, 1, r, rows, rows_of(out, i), out.row_stride);
    });
  }
  if (streamed) stream_fence();
}

// Vectors of 64 bytes leave a tile so much to do for each coefficient that these may come from L2.
constexpr int64_t kPolarRowRanks = kWidest == 16 ? 128 : kRowRanks;

// The Gram matrix of rows [begin, end), added to `gram`, and the factor of those rows: with panels kept between the two
// where one object does both.
template <typename T>
class PolarPasses {
 public:
  PolarPasses(const PolarJob& job, T scale, int64_t begin, int64_t end)
      : job_(job),
        by_rows_(std::is_same_v<T, float> && scale == T(1) && rows_are_vectors(job.in, kPolarRowRanks) &&
                 rows_are_vectors(job.out, kPolarRowRanks)),
        panels_(&job.in, nullptr, false, scale, begin, end) {}

  void gram(double* gram) {
    if (by_rows_)
      gram_of_rows(job_.in, panels_.begin, panels_.end, gram);
    else
      gram_pass(panels_, gram);
  }

  // With `gram`, adds the Gram matrix of the result.
  void update(const double* coefficients, double* gram) const {
    if (!by_rows_) return update_pass(panels_, coefficients, 0, false, job_.out, gram);
    const float* upcoming = static_cast<const float*>(job_.upcoming);
    if (job_.stream && !gram && can_stream(job_.out, panels_.begin))
      multiply_rows<true>(job_.in, job_.out, panels_.begin, panels_.end, coefficients, upcoming);
    else
      multiply_rows<false>(job_.in, job_.out, panels_.begin, panels_.end, coefficients, upcoming);
    if (gram) gram_of_rows(job_.out, panels_.begin, panels_.end, gram);
  }

 private:
  const PolarJob& job_;
  bool by_rows_;
  Panels<T> panels_;
};

template <typename T>
bool polar_newton_schulz(const PolarJob& job, T scale, double limit, Outcome* outcome) {
  const int64_t n = job.in.n, r = job.in.r;
  double* gram = zeroed_gram(r);
  PolarPasses<T> passes(job, scale, 0, n);
  passes.gram(gram);
  if (!gram_in_range<T>(gram, r)) return false;
  double* coefficients = scratch().solved.reserve<double>(r * r);
  if (!polar_coefficients<T>(gram, r, solve_tolerance<T>(), limit, coefficients, outcome)) return false;
  const bool bounded = is_finite(outcome->residual);
  if (bounded) {
    passes.update(coefficients, nullptr);
  } else {
    gram = zeroed_gram(r);
    passes.update(coefficients, gram);
    outcome->residual = root_of_sum(gram, r, r) + measured_roundoff<T>(r);
  }
  // Float64 arithmetic on shorter data: the Gram's round-off times its condition number, well below the storage's.
  const bool widened = std::is_same_v<T, double> && job.in.storage != Storage::float64;
  const double most = widened ? residual_limit<float>(r) / 64.0 : bounded ? bounded_limit<T>(r) : residual_limit<T>(r);
  const bool done = outcome->residual <= most;
  outcome->residual = stored_residual<T>(outcome->residual, job.out);
  return done;
}

// ||A^T A - I||_F of the n x r column-major A.
double gram_error(const double* A, int64_t n, int64_t r) {
  double* gram = zeroed_gram(r);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i; j < r; ++j) gram[i * r + j] = dot(A + i * n, A + j * n, n);
  return root_of_sum(gram, r, r);
}

// The factor is judged before it is written: whatever the iteration says of itself, it is orthonormal or not returned.
bool svd_to(double* columns, const MatrixView& out, Outcome* outcome) {
  const int64_t n = out.n, r = out.r;
  Buffer factor;
  double* Q = factor.reserve<double>(n * r);
  outcome->path = Path::svd;
  if (!svd_polar(columns, n, r, Q, &outcome->iterations)) {
    outcome->status = Status::not_converged;
    return false;
  }
  const double residual = gram_error(Q, n, r) + measured_roundoff<double>(r);
  if (!(residual <= residual_limit<double>(r) * __builtin_sqrt(static_cast<double>(r)))) {
    outcome->status = Status::not_converged;
    outcome->residual = __builtin_nan("");
    return false;
  }
  unpack(Q, n, out, 0, n);
  outcome->residual = stored_residual<double>(residual, out);
  return true;
}

void polar_by_svd(const PolarJob& job, double scale, Outcome* outcome) {
  Buffer tall;
  double* columns = tall.reserve<double>(job.in.n * job.in.r);
  pack<double>(job.in, 0, job.in.n, job.in.n, columns, job.in.n, scale);
  svd_to(columns, job.out, outcome);
}

void polar(const PolarJob& job, Method method, Outcome* outcome) {
  const int64_t n = job.in.n, r = job.in.r;
  *outcome = Outcome();
  if (n == 0 || r == 0) return;
  const bool wide = job.in.storage == Storage::float64;
  const double no_limit = 1e300;
  const bool automatic = method == Method::automatic;
  if (method != Method::svd) {
    const bool done = wide ? polar_newton_schulz<double>(job, 1.0, automatic ? kConditionLimit : no_limit, outcome)
                           : polar_newton_schulz<float>(job, 1.0f, kConditionLimit, outcome);
    if (done) return;
  }
  // Off the fast path: look at the data, scale it into range, work in float64.
  const double largest = largest_magnitude(job.in, 0, n);
  if (!is_finite(largest)) {
    outcome->status = Status::non_finite;
    outcome->residual = __builtin_nan("");
    return;
  }
  const double scale = largest > 0.0 ? power_of_two_scale(largest) : 1.0;
  if (method != Method::svd && largest > 0.0) {
    outcome->path = Path::float64_gram;
    const double limit = !automatic ? no_limit : wide ? kConditionLimit : kWidenedConditionLimit;
    if (polar_newton_schulz<double>(job, scale, limit, outcome)) return;
  }
  if (method == Method::newton_schulz) {
    outcome->status = Status::not_converged;
    return;
  }
  polar_by_svd(job, scale, outcome);
}

void polar_gram(const PolarJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.in, [&](auto zero) { PolarPasses<decltype(zero)>(job, 1, begin, end).gram(gram); });
}

bool polar_solve(const PolarJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  if (job.in.storage == Storage::float64)
    return gram_in_range<double>(gram, job.in.r) &&
           polar_coefficients<double>(gram, job.in.r, solve_tolerance<double>(), kConditionLimit, coefficients,
                                      outcome);
  return gram_in_range<float>(gram, job.in.r) &&
         polar_coefficients<float>(gram, job.in.r, solve_tolerance<float>(), kConditionLimit, coefficients, outcome);
}

void polar_update(const PolarJob& job, int64_t begin, int64_t end, const double* coefficients, double* gram) {
  with_arithmetic(job.in,
                  [&](auto zero) { PolarPasses<decltype(zero)>(job, 1, begin, end).update(coefficients, gram); });
}

bool polar_accept(const PolarJob& job, const double* gram, Outcome* outcome) {
  bool accepted = false;
  with_arithmetic(job.in, [&](auto zero) {
    using T = decltype(zero);
    const double residual = root_of_sum(gram, job.in.r, job.in.r) + measured_roundoff<T>(job.in.r);
    accepted = residual <= residual_limit<T>(job.in.r);
    outcome->residual = stored_residual<T>(residual, job.out);
  });
  return accepted;
}

}  // namespace
}  // namespace stella::STELLA_ISA

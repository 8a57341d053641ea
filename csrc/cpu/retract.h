// Tangent projection and polar retraction of one factor, in place.
#pragma once

#include "passes.h"
#include "polar.h"

namespace stella::STELLA_ISA {
namespace {

// From the Gram of [Y, Delta], blocks C = Y^T Y, A = Y^T Delta, D = Delta^T Delta: B = I - symm(A), the Gram of
// M = Y B + Delta as G = B^T C B + B A + A^T B + D, R = G^(-1/2). The new factor is Y (B R) + Delta R; the
// coefficients (2r x r) are [B R - I; R], to be added to Y, so that round-off scales with the step and not with Y.
bool retract_coefficients(const double* gram, int64_t r, double tolerance, double limit, double* coefficients,
                          Outcome* outcome) {
  const int64_t order = 2 * r, leading = square_leading(r), size = square_size(r);
  Buffer small;
  double* C = small.reserve<double>(4 * size);
  double* A = C + size;
  double* B = A + size;
  double* P = B + size;
  Scratch& s = scratch();
  double* G = s.square[4].reserve<double>(size);
  double* R = s.square[5].reserve<double>(size);
  symmetric_from_upper(gram, order, 0, r, C);
  symmetric_from_upper(gram, order, r, r, G);  // D
  for (int64_t i = 0; i < size; ++i) A[i] = B[i] = 0.0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) A[i * leading + j] = gram[i * order + r + j];
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j)
      B[i * leading + j] = (i == j ? 1.0 : 0.0) - 0.5 * (A[i * leading + j] + A[j * leading + i]);
  multiply(B, A, r, P);  // B^T A = B A
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) G[i * leading + j] += P[i * leading + j] + P[j * leading + i];
  multiply(C, B, r, P);  // C B
  multiply(B, P, r, A);  // B C B
  for (int64_t i = 0; i < size; ++i) G[i] += A[i];
  const SmallResult result = inverse_square_root(G, r, tolerance, R);
  outcome->iterations += result.iterations;
  outcome->residual = result.residual;
  // A step along Y cancels in G, and leaves there the round-off of the terms that cancelled.
  double terms = 1.0, sum = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    const double term = gram[(r + i) * order + r + i], left = G[i * leading + i];
    if (term > terms) terms = term;
    if (left > sum) sum = left;
  }
  const double growth = terms > sum ? terms / sum : 1.0;
  if (!result.converged || !(result.condition * growth <= limit)) return false;
  multiply(B, R, r, P);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) {
      coefficients[i * r + j] = P[i * leading + j] - (i == j ? 1.0 : 0.0);
      coefficients[(r + i) * r + j] = R[i * leading + j];
    }
  return true;
}

template <typename T>
bool retract_newton_schulz(const RetractJob& job, double limit, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  double* gram = zeroed_gram(2 * r);
  Panels<T> panels(&job.previous, &job.moved, true, static_cast<T>(1.0 / job.divisor), 0, n);
  gram_pass(panels, gram);
  Buffer small;
  double* coefficients = small.reserve<double>(2 * r * r);
  if (!retract_coefficients(gram, r, solve_tolerance<T>(), limit, coefficients, outcome)) return false;
  update_pass(panels, coefficients, 0, true, job.moved, nullptr);
  return true;
}

// M = Y B + Delta itself, scaled into range, then its polar factor by SVD. Y and D = Delta before its projection are
// n x r, column-major, and overwritten.
void retract_by_svd(double* Y, double* D, const MatrixView& out, Outcome* outcome) {
  const int64_t n = out.n, r = out.r;
  Buffer small;
  double* A = small.reserve<double>(r * r);
  double largest = 1.0;
  for (int64_t k = 0; k < n * r; ++k)
    if (absolute(D[k]) > largest) largest = absolute(D[k]);
  const double scale = power_of_two_scale(largest);  // uf(c M) = uf(M): the whole of M is formed scaled
  for (int64_t k = 0; k < n * r; ++k) D[k] *= scale;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) A[i * r + j] = dot(Y + i * n, D + j * n, n);
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = 0; i < r; ++i)
      add_scaled(D + j * n, Y + i * n, (i == j ? scale : 0.0) - 0.5 * (A[i * r + j] + A[j * r + i]), n);
  svd_to(D, out, outcome);
}

void retract_by_svd(const RetractJob& job, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  Buffer tall;
  double* Y = tall.reserve<double>(2 * n * r);
  double* D = Y + n * r;
  pack<double>(job.previous, 0, n, n, Y, n, 1.0);
  pack<double>(job.moved, 0, n, n, D, n, 1.0);
  for (int64_t k = 0; k < n * r; ++k) D[k] = D[k] / job.divisor - Y[k] / job.divisor;
  retract_by_svd(Y, D, job.moved, outcome);
}

void retract(const RetractJob& job, Method method, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  *outcome = Outcome();
  if (n == 0 || r == 0) return;
  const bool wide = job.moved.storage == Storage::float64;
  const double no_limit = 1e300;
  const bool automatic = method == Method::automatic;
  if (method != Method::svd) {
    const bool done = wide ? retract_newton_schulz<double>(job, automatic ? kDoubleConditionLimit : no_limit, outcome)
                           : retract_newton_schulz<float>(job, kFloatConditionLimit, outcome);
    if (done) return;
  }
  if (!all_finite(job.moved, 0, n) || !all_finite(job.previous, 0, n)) {
    outcome->status = Status::non_finite;
    outcome->residual = __builtin_nan("");
    return;
  }
  if (method != Method::svd && !wide) {
    outcome->path = Path::float64_gram;
    if (retract_newton_schulz<double>(job, automatic ? kWidenedConditionLimit : no_limit, outcome)) return;
  }
  if (method == Method::newton_schulz) {
    outcome->status = Status::not_converged;
    return;
  }
  retract_by_svd(job, outcome);
}

void retract_gram(const RetractJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.moved, [&](auto zero) {
    using T = decltype(zero);
    Panels<T> panels(&job.previous, &job.moved, true, static_cast<T>(1.0 / job.divisor), begin, end);
    gram_pass(panels, gram);
  });
}

bool retract_solve(const RetractJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  if (job.moved.storage == Storage::float64)
    return retract_coefficients(gram, job.moved.r, solve_tolerance<double>(), kDoubleConditionLimit, coefficients,
                                outcome);
  return retract_coefficients(gram, job.moved.r, solve_tolerance<float>(), kFloatConditionLimit, coefficients, outcome);
}

void retract_update(const RetractJob& job, int64_t begin, int64_t end, const double* coefficients) {
  with_arithmetic(job.moved, [&](auto zero) {
    using T = decltype(zero);
    const Panels<T> panels(&job.previous, &job.moved, true, static_cast<T>(1.0 / job.divisor), begin, end);
    update_pass(panels, coefficients, 0, true, job.moved, nullptr);
  });
}

}  // namespace
}  // namespace stella::STELLA_ISA

// Tangent projection and polar retraction of one factor, in place.
#pragma once

#include "stiefel/passes.h"
#include "stiefel/polar.h"
#include "stiefel/retract_rows.h"

namespace stella::STELLA_ISA {
namespace {

// The Gram matrix of M = Y B + Delta, B = I - S, S = symm(A), from C = Y^T Y, A = Y^T Delta and D = Delta^T Delta:
// G = B C B + B A + A^T B + D. For C = I + K that is I + K + D - P - P^T + S K S with the one product
// P = S (A + K - S/2), small beside I like its factors, so that T's own precision is enough for it; S K S is dropped
// where it is below the tolerance. G holds D when it comes here; A may be overwritten.
template <typename T>
void gram_of_moved(double* C, double* A, double* G, int64_t r, double tolerance) {
  const int64_t leading = square_leading(r), padded = square_leading<T>(r), size = square_size<T>(r);
  T* S = scratch().square[0].reserve<T>(3 * size);
  T *X = S + size, *P = X + size;
  double symmetric = 0.0, deviation = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      const double s = 0.5 * (A[i * leading + j] + A[j * leading + i]);
      const double k = C[i * leading + j] - (i == j ? 1.0 : 0.0);
      symmetric += s * s;
      deviation += k * k;
      S[i * padded + j] = static_cast<T>(s);
      X[i * padded + j] = static_cast<T>(A[i * leading + j] + k - 0.5 * s);
    }
    for (int64_t j = r; j < padded; ++j) S[i * padded + j] = X[i * padded + j] = T(0);
  }
  if (symmetric * __builtin_sqrt(deviation) <= tolerance && symmetric < 1.0) {
    multiply(S, X, r, P);
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j)
        G[i * leading + j] += C[i * leading + j] - static_cast<double>(P[i * padded + j] + P[j * padded + i]);
    return;
  }
  double* B = scratch().square[1].reserve<double>(2 * square_size(r));
  double* product = B + square_size(r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j)
      B[i * leading + j] = (i == j ? 1.0 : 0.0) - 0.5 * (A[i * leading + j] + A[j * leading + i]);
    for (int64_t j = r; j < leading; ++j) B[i * leading + j] = 0.0;
  }
  multiply(B, A, r, product);  // B^T A = B A
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) G[i * leading + j] += product[i * leading + j] + product[j * leading + i];
  multiply(C, B, r, product);  // C B
  multiply(B, product, r, A);  // B C B
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) G[i * leading + j] += A[i * leading + j];
}

// From the Gram of [Y, Delta] to R = G^(-1/2), G that of M = Y B + Delta. The new factor is Y (B R) + Delta R; the
// coefficients (2r x r) are [B R - I; R], to be added to Y, so that round-off scales with the step and not with Y.
//
// The residual is bounded (residual.h) with a bound on the condition number; without one, with the Frobenius norms of G
// and R, which are good enough for float64 beside shorter data only. False where that is not round-off: `limits` are of
// the condition number and of the residual. The drift is known in any case.
struct Limits {
  double condition, residual;
};

template <typename T>
bool retract_coefficients(const double* gram, int64_t r, const Limits& limits, double* coefficients, Outcome* outcome) {
  const int64_t order = 2 * r, leading = square_leading(r), size = square_size(r);
  const double tolerance = solve_tolerance<T>();
  Scratch& s = scratch();
  double* C = s.square[8].reserve<double>(2 * size);
  double* A = C + size;
  double* G = s.square[4].reserve<double>(size);
  double* R = s.square[5].reserve<double>(size);
  outcome->drift = root_of_sum(gram, r, order);
  symmetric_from_upper(gram, order, 0, r, C);
  symmetric_from_upper(gram, order, r, r, G);  // D
  for (int64_t i = 0; i < size; ++i) A[i] = 0.0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) A[i * leading + j] = gram[i * order + r + j];
  gram_of_moved<T>(C, A, G, r, tolerance);
  const SmallResult result = inverse_square_root<T>(G, r, tolerance, R);
  outcome->iterations += result.iterations;
  // A step along Y cancels in G, and leaves there the round-off of the terms that cancelled. Q leaves that of Y, from
  // which Y (I - B R) is taken: ||Y||_2^2 <= 1 + drift.
  double terms = 1.0, sum = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    const double term = gram[(r + i) * order + r + i], left = G[i * leading + i];
    if (term > terms) terms = term;
    if (left > sum) sum = left;
  }
  const double growth = (terms > sum ? terms / sum : 1.0) * __builtin_sqrt(1.0 + outcome->drift);
  if (!result.converged || !(result.condition * growth <= limits.condition)) return false;
  double condition = result.condition;
  if (!result.bounded) {
    const double root = frobenius_norm(R, r);
    condition = frobenius_norm(G, r) * root * root;
  }
  outcome->residual = result.residual + product_roundoff<T>(r, condition * growth);
  if (!(outcome->residual <= limits.residual)) return false;
  // B R - I = (R - I) - S R: both small, S R a product in T.
  const int64_t padded = square_leading<T>(r);
  T* S = s.square[0].reserve<T>(3 * square_size<T>(r));
  T *root = S + square_size<T>(r), *product = root + square_size<T>(r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      S[i * padded + j] = static_cast<T>(0.5 * (gram[i * order + r + j] + gram[j * order + r + i]));
      root[i * padded + j] = static_cast<T>(R[i * leading + j]);
    }
    for (int64_t j = r; j < padded; ++j) S[i * padded + j] = root[i * padded + j] = T(0);
  }
  multiply(S, root, r, product);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) {
      const double value = R[i * leading + j];
      coefficients[i * r + j] = value - (i == j ? 1.0 : 0.0) - static_cast<double>(product[i * padded + j]);
      coefficients[(r + i) * r + j] = value;
    }
  return true;
}

// The Gram matrix of [Y, Delta] over rows [begin, end), and the update of those rows: with panels kept between the two
// where one object does both.
template <typename T>
class RetractPasses {
 public:
  RetractPasses(const RetractJob& job, int64_t begin, int64_t end)
      : job_(job),
        by_rows_(std::is_same_v<T, float> && retract_by_rows(job)),
        panels_(&job.previous, &job.moved, true, static_cast<T>(1.0 / job.divisor), begin, end) {}

  void gram(double* gram) {
    if (by_rows_)
      retract_gram_of_rows(job_, panels_.begin, panels_.end, gram);
    else
      gram_pass(panels_, gram);
  }

  void update(const double* coefficients) const {
    if (by_rows_)
      retract_update_of_rows(job_, panels_.begin, panels_.end, coefficients);
    else
      update_pass(panels_, coefficients, 0, true, job_.moved, nullptr);
  }

 private:
  const RetractJob& job_;
  bool by_rows_;
  Panels<T> panels_;
};

// In T, for what is then stored in `out`; of 'newton_schulz' the condition number alone does not matter.
template <typename T>
Limits retract_limits(const MatrixView& out, bool automatic) {
  if (std::is_same_v<T, double> && out.storage != Storage::float64)
    return {automatic ? kWidenedConditionLimit : __builtin_inf(),
            automatic ? residual_limit<float>(out.r) / 16.0 : residual_limit<float>(out.r)};
  if (std::is_same_v<T, float> || automatic) return {kConditionLimit, bounded_limit<T>(out.r)};
  return {__builtin_inf(), 1e-8};  // half of float64's digits: what has fewer has not converged
}

template <typename T>
bool retract_newton_schulz(const RetractJob& job, bool automatic, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  double* gram = zeroed_gram(2 * r);
  RetractPasses<T> passes(job, 0, n);
  passes.gram(gram);
  Buffer small;
  double* coefficients = small.reserve<double>(2 * r * r);
  if (!retract_coefficients<T>(gram, r, retract_limits<T>(job.moved, automatic), coefficients, outcome)) return false;
  passes.update(coefficients);
  outcome->residual = stored_residual<T>(outcome->residual, job.moved);
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
  if (!is_finite(largest)) {
    outcome->status = Status::overflow;
    outcome->residual = __builtin_nan("");
    return;
  }
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
  if (!(outcome->drift == outcome->drift)) outcome->drift = gram_error(Y, n, r);
  for (int64_t k = 0; k < n * r; ++k) D[k] = D[k] / job.divisor - Y[k] / job.divisor;
  retract_by_svd(Y, D, job.moved, outcome);
}

// What is orthonormal to half of float64's digits, to all of them: its own polar factor, in place.
void polish(const MatrixView& factor, Outcome* outcome) {
  if (outcome->residual <= bounded_limit<double>(factor.r)) return;
  PolarJob again{};
  again.in = again.out = factor;
  Outcome second;
  if (!polar_newton_schulz<double>(again, 1.0, kConditionLimit, &second)) return;
  outcome->residual = second.residual;
  outcome->iterations += second.iterations;
}

void retract(const RetractJob& job, Method method, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  *outcome = Outcome();
  if (n == 0 || r == 0) return;
  const bool wide = job.moved.storage == Storage::float64;
  const bool automatic = method == Method::automatic;
  outcome->drift = __builtin_nan("");
  if (method != Method::svd) {
    const bool done = wide ? retract_newton_schulz<double>(job, automatic, outcome)
                           : retract_newton_schulz<float>(job, automatic, outcome);
    if (done && wide && !automatic) polish(job.moved, outcome);
    if (done) return;
  }
  if (!all_finite(job.moved) || !all_finite(job.previous)) {
    outcome->status = Status::non_finite;
    outcome->residual = __builtin_nan("");
    return;
  }
  if (method != Method::svd && !wide) {
    outcome->path = Path::float64_gram;
    if (retract_newton_schulz<double>(job, automatic, outcome)) return;
  }
  if (method == Method::newton_schulz) {
    outcome->status = Status::not_converged;
    outcome->residual = __builtin_nan("");
    return;
  }
  retract_by_svd(job, outcome);
}

void retract_gram(const RetractJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.moved, [&](auto zero) {
    using T = decltype(zero);
    RetractPasses<T>(job, begin, end).gram(gram);
  });
}

bool retract_solve(const RetractJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  bool solved = false;
  with_arithmetic(job.moved, [&](auto zero) {
    using T = decltype(zero);
    const Limits limits = retract_limits<T>(job.moved, true);
    solved = retract_coefficients<T>(gram, job.moved.r, limits, coefficients, outcome);
    outcome->residual = stored_residual<T>(outcome->residual, job.moved);
  });
  return solved;
}

// Whose Gram matrix is ill-conditioned: what is round-off in float64 is that of T in the factor, since the Gram was
// summed from T. Refused where that leaves nothing to go on from.
bool retract_solve_far(const RetractJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  *outcome = Outcome();
  const Limits none = {__builtin_inf(), __builtin_inf()};
  if (!retract_coefficients<double>(gram, job.moved.r, none, coefficients, outcome)) return false;
  outcome->path = Path::float64_gram;
  const bool wide = job.moved.storage == Storage::float64;
  outcome->residual *= wide ? 1.0 : unit_roundoff<float>() / unit_roundoff<double>();
  outcome->residual = stored_residual<double>(outcome->residual, job.moved);
  return outcome->residual <= 0.25;
}

void retract_update(const RetractJob& job, int64_t begin, int64_t end, const double* coefficients) {
  with_arithmetic(job.moved, [&](auto zero) {
    using T = decltype(zero);
    RetractPasses<T>(job, begin, end).update(coefficients);
  });
}

}  // namespace
}  // namespace stella::STELLA_ISA

// R = G^(-1/2) of an r x r symmetric positive definite matrix: by the binomial series near a multiple of the identity,
// else in float64 by coupled Newton-Schulz.
//
// With E = I - Z Y the coupled iteration Y <- Y T, Z <- T Z takes T = I + E/2 + 3 E^2/8, the head of the series of
// (I - E)^(-1/2), or T = I + E/2 where that is enough (Higham, Functions of Matrices, 2008, sections 5.3 and 6.4). Then
// I - (I - E) T^2 is 5/8 E^3 + 15/64 E^4 + 9/64 E^5, or 3/4 E^2 + 1/4 E^3: a bound on ||E|| at the start gives the
// number of steps before the first product is made.
#pragma once

#include "common/binomial_series.h"

namespace stella::STELLA_ISA {

constexpr int kMaximumIterations = 64;

struct SmallResult {
  bool converged = false;
  int iterations = 0;
  double residual = 0.0;   // ||R G R - I||_F
  double condition = 1.0;  // of G
  bool bounded = false;    // the condition number is a bound, not an estimate
};

// Whether to take I + E/2: where it takes an error of norm e below the tolerance, and where no bound below one is known
// yet, for it amplifies the round-off of an ill-conditioned matrix less.
STELLA_INLINE bool takes_short_step(double e, double tolerance) {
  return !(e < 1.0) || e * e * (0.75 + 0.25 * e) <= tolerance;
}

// What a step leaves of an error of norm e, by the recursion.
inline double error_after(double e, double tolerance) {
  if (takes_short_step(e, tolerance)) return e * e * (0.75 + 0.25 * e);
  return e * e * e * (0.625 + e * (15.0 + 9.0 * e) / 64.0);
}

// Number of steps that take an error of `bound` below `tolerance`; -1 when none is promised.
inline int steps_for(double bound, double tolerance) {
  if (!(bound < 1.0)) return -1;
  int steps = 0;
  for (; bound > tolerance && steps < kMaximumIterations; ++steps) bound = error_after(bound, tolerance);
  return steps;
}

// The largest eigenvalue of a symmetric positive matrix, from below, by the power method.
inline double largest_eigenvalue(const double* a, int64_t r, double* vectors) {
  const int64_t leading = square_leading(r);
  double* x = vectors;
  double* y = vectors + r;
  for (int64_t i = 0; i < r; ++i) x[i] = 1.0 + 0.5 * static_cast<double>((i * 7919) % 13) / 13.0 * (i % 2 ? -1.0 : 1.0);
  double value = 0.0;
  for (int step = 0; step < 12; ++step) {
    double norm = 0.0;
    for (int64_t i = 0; i < r; ++i) norm += x[i] * x[i];
    norm = __builtin_sqrt(norm);
    if (!(norm > 0.0)) return value;
    for (int64_t i = 0; i < r; ++i) x[i] /= norm;
    value = 0.0;
    for (int64_t i = 0; i < r; ++i) y[i] = dot(a + i * leading, x, r);
    for (int64_t i = 0; i < r; ++i) value += y[i] * y[i];
    value = __builtin_sqrt(value);
    double* swap = x;
    x = y;
    y = swap;
  }
  return value;
}

// T of the iteration for P = Z Y, which is overwritten by E = I - P; `error` is a bound on its norm, `square` is
// scratch.
inline void iteration_factor(double* P, int64_t r, double error, double tolerance, double* square, double* T) {
  const int64_t leading = square_leading(r), size = r * leading;
  for (int64_t i = 0; i < size; ++i) P[i] = -P[i];
  for (int64_t i = 0; i < r; ++i) P[i * leading + i] += 1.0;
  if (takes_short_step(error, tolerance)) {
    for (int64_t i = 0; i < size; ++i) T[i] = 0.5 * P[i];
  } else {
    for (int64_t i = 0; i < size; ++i) T[i] = P[i];
    transpose(T, r);
    multiply(T, P, r, square);  // P P: P^T P would feed the asymmetry back
    for (int64_t i = 0; i < size; ++i) T[i] = 0.5 * P[i] + 0.375 * square[i];
  }
  for (int64_t i = 0; i < r; ++i) T[i * leading + i] += 1.0;
}

// R by the series around `scale` times the identity; converged is false where that takes too many terms.
template <typename T>
SmallResult inverse_square_root_near_identity(const double* G, int64_t r, double scale, double tolerance, double* R) {
  SmallResult result;
  const int64_t leading = square_leading(r), padded = square_leading<T>(r), size = square_size<T>(r);
  T* E = scratch().square[0].reserve<T>(6 * size);
  T* F = E + size;
  const double inverse = 1.0 / scale;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j)
      E[i * padded + j] = static_cast<T>((i == j ? 1.0 : 0.0) - G[i * leading + j] * inverse);
    for (int64_t j = r; j < padded; ++j) E[i * padded + j] = T(0);
  }
  const SeriesResult series = inverse_square_root_series(E, r, tolerance, F + size, F);
  if (!series.found) return result;
  const double root = 1.0 / __builtin_sqrt(scale);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j)
      R[i * leading + j] = root * ((i == j ? 1.0 : 0.0) + static_cast<double>(F[i * padded + j]));
  result.converged = result.bounded = true;
  result.condition = (1.0 + series.spectral) / (1.0 - series.spectral);
  result.residual = series.residual;
  return result;
}

// G and R have leading dimension square_leading(r); G is symmetric. Series, double or float, is the arithmetic of the
// series. square[0..3] and square[6..7] of the scratch are used.
template <typename Series>
SmallResult inverse_square_root(const double* G, int64_t r, double tolerance, double* R) {
  SmallResult result;
  const int64_t leading = square_leading(r);
  double trace = 0.0, frobenius = 0.0, row_sum = 0.0, low = G[0];
  for (int64_t i = 0; i < r; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < r; ++j) {
      const double g = G[i * leading + j];
      frobenius += g * g;
      sum += absolute(g);
    }
    const double diagonal = G[i * leading + i];
    trace += diagonal;
    if (sum > row_sum) row_sum = sum;
    if (diagonal - (sum - diagonal) < low) low = diagonal - (sum - diagonal);
  }
  if (!is_finite(frobenius) || !(trace > 0.0)) return result;

  if (frobenius * static_cast<double>(r) < 1.04 * trace * trace) {  // else some eigenvalue of E is past 0.2
    const SmallResult near = inverse_square_root_near_identity<Series>(G, r, frobenius / trace, tolerance, R);
    if (near.converged) return near;
  }

  const int64_t size = square_size(r);
  Scratch& s = scratch();
  double* Y = s.square[0].reserve<double>(size);
  double* Z = s.square[1].reserve<double>(size);
  double* T = s.square[2].reserve<double>(size);
  double* P = s.square[3].reserve<double>(size);
  double* square = s.square[6].reserve<double>(size);
  double* best = s.square[7].reserve<double>(size);

  // Scalings with a bound on E = G/c - I in the spectral norm, cheapest first: the Frobenius norm at its best c,
  // Gershgorin's interval at its centre, and sqrt(||E^2||_F) for one product.
  const double spread = static_cast<double>(r) - trace * trace / frobenius;
  double scale = frobenius / trace;
  double bound = __builtin_sqrt(spread > 0.0 ? spread : 0.0) + 1e-15 * static_cast<double>(r);
  const double gershgorin_bound = low > 0.0 ? (row_sum - low) / (row_sum + low) : 1.0;
  if (gershgorin_bound < bound) {
    scale = 0.5 * (row_sum + low);
    bound = gershgorin_bound;
  }
  if (bound >= 0.5) {
    for (int64_t i = 0; i < r * leading; ++i) Y[i] = G[i] * (trace / frobenius);
    for (int64_t i = 0; i < r; ++i) Y[i * leading + i] -= 1.0;
    multiply(Y, Y, r, P);
    const double square_bound = __builtin_sqrt(frobenius_norm(P, r));
    if (square_bound < bound) {
      scale = frobenius / trace;
      bound = square_bound;
    }
  }
  const bool promised = bound < 1.0;
  if (!promised) {  // put the spectrum in (0, 1] and measure until the error is below one
    const double norm = __builtin_sqrt(frobenius);
    scale = norm < row_sum ? norm : row_sum;
  }

  for (int64_t i = 0; i < r * leading; ++i) Y[i] = G[i] / scale;
  for (int64_t i = 0; i < r * leading; ++i) P[i] = Y[i];
  iteration_factor(P, r, bound, tolerance, square, T);
  for (int64_t i = 0; i < r * leading; ++i) Z[i] = T[i];
  multiply(T, Y, r, P);
  double* swap = Y;
  Y = P;
  P = swap;
  result.iterations = 1;

  int remaining = steps_for(bound, tolerance) - 1;  // one step is behind us; negative: not known yet
  double expected = promised ? error_after(bound, tolerance) : __builtin_inf();  // bound on the spectral norm
  double previous = 1e300;
  for (;;) {
    multiply(Z, Y, r, P);  // Z Y -> I
    const double error = frobenius_norm(P, r, 1.0);
    result.residual = error;
    if (previous < 0.25 && !(error < 0.5 * previous)) {  // round-off has taken over: the step before was the best
      if (!(error < previous)) {
        for (int64_t i = 0; i < r * leading; ++i) Z[i] = best[i];
        result.residual = previous;
      }
      break;
    }
    if (!is_finite(error)) return result;
    if (error <= tolerance || (promised && remaining <= 0)) break;
    if (result.iterations >= kMaximumIterations) return result;
    if (error < 0.25)
      for (int64_t i = 0; i < r * leading; ++i) best[i] = Z[i];
    previous = error;
    // Y <- T^T Y and Z <- T Z with T a polynomial of Z Y: the orders in which round-off is damped (Higham 2008, section
    // 6.4); with Z <- T^T Z it grows until nothing is left, at condition numbers of 100 already.
    // The steps that were counted: the measured norm, Frobenius', may be past one where the spectral one is not.
    const double least = error < expected ? error : expected;
    iteration_factor(P, r, least, tolerance, square, T);
    expected = error_after(least, tolerance);
    multiply(T, Y, r, P);
    swap = Y;
    Y = P;
    P = swap;
    transpose(T, r);
    multiply(T, Z, r, P);
    swap = Z;
    Z = P;
    P = swap;
    ++result.iterations;
    --remaining;
  }

  const double root = 1.0 / __builtin_sqrt(scale);
  for (int64_t i = 0; i < r; ++i)  // the product is symmetric but for round-off
    for (int64_t j = 0; j < r; ++j) R[i * leading + j] = 0.5 * root * (Z[i * leading + j] + Z[j * leading + i]);
  result.converged = result.residual < 0.25;
  if (bound < 0.88) {
    result.condition = (1.0 + bound) / (1.0 - bound);
    result.bounded = true;
  } else {
    double* vectors = s.vectors.reserve<double>(2 * r);
    const double inverse_root = largest_eigenvalue(R, r, vectors);
    result.condition = largest_eigenvalue(G, r, vectors) * inverse_root * inverse_root;
  }
  return result;
}

}  // namespace stella::STELLA_ISA

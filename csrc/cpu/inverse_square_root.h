// R = G^(-1/2) of an r x r symmetric positive definite matrix in float64, by coupled Newton-Schulz.
//
// With E_k = I - Z_k Y_k the coupled iteration T = (3 I - Z Y)/2, Y <- Y T, Z <- T Z has the error recursion
// E_{k+1} = (3 E_k^2 + E_k^3)/4 (Higham, Functions of Matrices, 2008, section 6.4 and theorem 6.9), so a bound on
// ||E_0|| gives the number of steps before the first product is made.
#pragma once

#include "microkernels.h"

namespace stella::STELLA_ISA {

constexpr int kMaximumIterations = 64;

struct SmallResult {
  bool converged = false;
  int iterations = 0;
  double residual = 0.0;   // ||R G R - I||_F
  double condition = 1.0;  // of G
  bool bounded = false;    // the condition number is a bound, not an estimate
};

STELLA_INLINE int64_t square_leading(int64_t r) { return round_up(r, kLanes<double>); }
STELLA_INLINE int64_t square_size(int64_t r) { return round_up(r, kCombineColumns) * square_leading(r); }

STELLA_INLINE double absolute(double x) { return x < 0 ? -x : x; }
STELLA_INLINE bool is_finite(double x) { return x - x == 0.0; }

inline double dot(const double* a, const double* b, int64_t n) {
  using V = Vector<double>;
  V sum = {};
  int64_t i = 0;
  for (; i + kLanes<double> <= n; i += kLanes<double>) sum += load<V>(a + i) * load<V>(b + i);
  double total = 0.0;
  for (int lane = 0; lane < kLanes<double>; ++lane) total += sum[lane];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// out = a^T b for r x r matrices with leading dimension square_leading(r), rows padded to four.
inline void multiply(const double* a, const double* b, int64_t r, double* out) {
  const int64_t leading = square_leading(r);
  double* blocked = scratch().coefficients.reserve<double>(round_up(r, kCombineColumns) * r);
  block_coefficients(a, leading, r, r, blocked);
  combine<double>(b, r, leading, blocked, r, nullptr, out, leading, leading);
}

// Number of steps that take an error of `bound` below `tolerance`, by the recursion; -1 when none is promised.
inline int steps_for(double bound, double tolerance) {
  if (!(bound < 1.0)) return -1;
  int steps = 0;
  while (bound > tolerance && steps < kMaximumIterations) {
    bound = 0.75 * bound * bound + 0.25 * bound * bound * bound;
    ++steps;
  }
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

// ||a - shift I||_F
inline double frobenius_norm(const double* a, int64_t r, double shift = 0.0) {
  const int64_t leading = square_leading(r);
  double sum = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    const double* row = a + i * leading;
    const double off = row[i] - shift;
    sum += dot(row, row, i) + dot(row + i + 1, row + i + 1, r - i - 1) + off * off;
  }
  return __builtin_sqrt(sum);
}

// T = (3 I - a)/2
inline void newton_schulz_factor(const double* a, int64_t r, double* out) {
  const int64_t leading = square_leading(r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) out[i * leading + j] = -0.5 * a[i * leading + j];
    for (int64_t j = r; j < leading; ++j) out[i * leading + j] = 0.0;
    out[i * leading + i] += 1.5;
  }
}

inline void transpose(double* a, int64_t r) {
  const int64_t leading = square_leading(r);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i + 1; j < r; ++j) {
      const double upper = a[i * leading + j];
      a[i * leading + j] = a[j * leading + i];
      a[j * leading + i] = upper;
    }
}

// G and R have leading dimension square_leading(r); G is symmetric. square[0..3] of the scratch are used.
inline SmallResult inverse_square_root(const double* G, int64_t r, double tolerance, double* R) {
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

  const int64_t size = square_size(r);
  Scratch& s = scratch();
  double* Y = s.square[0].reserve<double>(size);
  double* Z = s.square[1].reserve<double>(size);
  double* T = s.square[2].reserve<double>(size);
  double* P = s.square[3].reserve<double>(size);

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
  newton_schulz_factor(Y, r, T);
  for (int64_t i = 0; i < r * leading; ++i) Z[i] = T[i];
  multiply(T, Y, r, P);
  double* swap = Y;
  Y = P;
  P = swap;
  result.iterations = 1;

  int remaining = steps_for(bound, tolerance) - 1;  // one step is behind us; negative: not known yet
  double previous = 1e300;
  int stalled = 0;
  for (;;) {
    multiply(Z, Y, r, P);  // Z Y -> I
    const double error = frobenius_norm(P, r, 1.0);
    result.residual = error;
    if (!is_finite(error)) return result;
    if (error <= tolerance || (promised && remaining <= 0)) break;
    if (result.iterations >= kMaximumIterations) return result;
    if (error >= 0.5 * previous && error < 0.5) {  // round-off has taken over
      if (++stalled > 1) break;
    }
    previous = error;
    // Y <- T^T Y and Z <- T Z with T = (3 I - Z Y)/2: the orders in which round-off is damped (Higham 2008, section
    // 6.4); with Z <- T^T Z it grows until nothing is left, at condition numbers of 100 already.
    newton_schulz_factor(P, r, T);
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

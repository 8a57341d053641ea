// How far from orthonormal a factor is as it was stored: measured, or bounded, always from above.
//
// Q = M R in T, with G = M^T M and R near G^(-1/2): ||Q^T Q - I||_F is at most that of R G R, which the solve knows,
// and
// - R E R for the round-off E of the Gram matrix, relative to the condition number of G and to what cancelled in it. Of
// a
//   diagonal element it is largest where all terms are alike, since round-offs then are too: up to unit / 4 for each
//   term of a sum, of which 32 are summed before they are added to others: 8 unit.
// - the round-off of the product, 2r terms of random sign (0.42 unit each, in the mean over mantissas) for each value
//   of Q, so 0.42 sqrt(2r) unit ||Q||_F, and sqrt(2) of that in Q^T Q; with half as much again, 1.25 sqrt(r). And 2 for
//   its coefficients and the last rounding.
// In all unit * sqrt(r) * (2 + 1.25 sqrt(r) + 8 condition).
// Where Q is then stored in a shorter type, each value moves by at most u |q| + eta (eta: half the least subnormal),
// the whole by d = u ||Q||_F + eta sqrt(n r) in the Frobenius norm, and Q^T Q by at most d (2 ||Q||_2 + d).
#pragma once

#include <type_traits>

#include "common/kernels.h"
#include "common/small_matrix.h"

namespace stella::STELLA_ISA {
namespace {

// Past this condition number of the Gram matrix its round-off shows in the factor: the Gram's relative error is a few
// units of round-off, and the factor's error is that times the condition number.
constexpr double kConditionLimit = 16.0;
constexpr double kWidenedConditionLimit = 1e8;  // float32 data, float64 Gram: 1e8 * 1.1e-16 is below float32's 6e-8

template <typename T>
constexpr double unit_roundoff() {
  return std::is_same_v<T, float> ? 5.97e-8 : 1.12e-16;
}

// Of the Gram matrix and the product, as above.
template <typename T>
double product_roundoff(int64_t r, double condition) {
  const double root = __builtin_sqrt(static_cast<double>(r));
  return unit_roundoff<T>() * root * (2.0 + 1.25 * root + 8.0 * condition);
}

// Of a Gram matrix that was computed only to measure a residual.
template <typename T>
double measured_roundoff(int64_t r) {
  return 8.0 * unit_roundoff<T>() * __builtin_sqrt(static_cast<double>(r));
}

// The residual of what a matrix computed in T with this one is once it is stored.
template <typename T>
double stored_residual(double residual, const MatrixView& out) {
  double unit = 0.0, least = 0.0;
  switch (out.storage) {
    case Storage::float64:
      return residual;
    case Storage::float32:
      if (std::is_same_v<T, float>) return residual;
      unit = 0x1p-24;
      break;
    case Storage::bfloat16:
      unit = 0x1p-8;
      break;
    case Storage::float16:
      unit = 0x1p-11;
      least = 0x1p-25;
      break;
  }
  const double r = static_cast<double>(out.r), n = static_cast<double>(out.n);
  const double norm = __builtin_sqrt(1.0 + residual);
  const double moved = unit * __builtin_sqrt(r) * norm + least * __builtin_sqrt(n * r);
  return residual + moved * (2.0 * norm + moved);
}

// What a measured residual may be before it is stored: the round-off of r columns of unit length, with room for the
// condition limit.
template <typename T>
double residual_limit(int64_t r) {
  return 64.0 * unit_roundoff<T>() * __builtin_sqrt(static_cast<double>(r));
}

// What a bounded one may be: that of the condition limit, and round-off of the solve.
template <typename T>
double bounded_limit(int64_t r) {
  return product_roundoff<T>(r, kConditionLimit) + 0.25 * residual_limit<T>(r);
}

// ||A - I||_F from the upper triangle of A.
double root_of_sum(const double* upper, int64_t r, int64_t leading) {
  double sum = 0.0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i; j < r; ++j) {
      const double e = upper[i * leading + j] - (i == j ? 1.0 : 0.0);
      sum += (i == j ? 1.0 : 2.0) * e * e;
    }
  return __builtin_sqrt(sum);
}

// A factor this near the manifold has ||Y||_2 <= 2: what bounds of overflow are made for.
constexpr double kNearDrift = 3.0;

}  // namespace
}  // namespace stella::STELLA_ISA

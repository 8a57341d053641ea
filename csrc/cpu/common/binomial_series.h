// (I - E)^(-1/2) - I of a small symmetric E by the head of its binomial series, sum over k of binom(2k, k) / 4^k E^k.
// A training step leaves the Gram matrix within a few per cent of the identity: two or three products are then enough,
// and since the result is small, float32 products are exact enough for float32 data.
#pragma once

#include "common/small_matrix.h"

namespace stella::STELLA_ISA {

constexpr double kSeries[11] = {1.0,
                                1.0 / 2.0,
                                3.0 / 8.0,
                                5.0 / 16.0,
                                35.0 / 128.0,
                                63.0 / 256.0,
                                231.0 / 1024.0,
                                429.0 / 2048.0,
                                6435.0 / 32768.0,
                                12155.0 / 65536.0,
                                46189.0 / 262144.0};

// What a head of `degree` leaves of R G R - I, in the Frobenius norm, for E of spectral norm at most `spectral` and
// Frobenius norm at most `frobenius`: with p = f - t for the whole series f, (1 - x) p^2 - 1 is -2 (1 - x) f t + ...,
// at most 2.2 |t| here, and |t| at most the first term left out over 1 - |x|.
inline double series_residual(int degree, double spectral, double frobenius) {
  double power = frobenius;
  for (int k = 0; k < degree; ++k) power *= spectral;
  return 2.2 * kSeries[degree + 1] * power / (1.0 - spectral);
}

// The cheapest head with a residual below the tolerance, or 0: there is none up to degree 9.
inline int series_degree(double spectral, double frobenius, double tolerance) {
  if (!(spectral < 0.2)) return 0;
  constexpr int kDegrees[] = {2, 4, 6, 9};  // of one, two, three and four products
  for (const int degree : kDegrees)
    if (series_residual(degree, spectral, frobenius) <= tolerance) return degree;
  return 0;
}

// out = c0 I + c1 E + c2 E2 [+ c3 E3], with the coefficients of the series from `at` on.
template <typename T>
void series_terms(int at, int count, const T* const* powers, int64_t r, T* out) {
  const int64_t leading = square_leading<T>(r);
  const T c1 = static_cast<T>(kSeries[at + 1]), c2 = static_cast<T>(kSeries[at + 2]);
  if (count == 4) {
    const T c3 = static_cast<T>(kSeries[at + 3]);
    for (int64_t i = 0; i < r * leading; ++i) out[i] = c1 * powers[0][i] + c2 * powers[1][i] + c3 * powers[2][i];
  } else {
    for (int64_t i = 0; i < r * leading; ++i) out[i] = c1 * powers[0][i] + c2 * powers[1][i];
  }
  if (at > 0)  // the identity itself is the caller's: it is left out of F
    for (int64_t i = 0; i < r; ++i) out[i * leading + i] += static_cast<T>(kSeries[at]);
}

struct SeriesResult {
  bool found = false;     // false: the series is too long
  double residual = 0.0;  // bound on what leaving out its tail does to ||R G R - I||_F
  double spectral = 0.0;  // bound on ||E||_2
};

// F = (I - E)^(-1/2) - I of a symmetric E. `work` is scratch for four squares.
template <typename T>
SeriesResult inverse_square_root_series(const T* E, int64_t r, double tolerance, T* work, T* F) {
  const int64_t size = square_size<T>(r), count = r * square_leading<T>(r);
  SeriesResult result;
  const double frobenius = 1.0001 * frobenius_norm(E, r);  // with room for the round-off of the norm
  if (!(frobenius < 2.0)) return result;
  T *E2 = work, *E3 = work + size, *head = work + 2 * size, *product = work + 3 * size;
  multiply(E, E, r, E2);
  const double square = 1.0001 * __builtin_sqrt(frobenius_norm(E2, r));  // ||E||_2 <= sqrt(||E^2||_F)
  result.spectral = square < frobenius ? square : frobenius;
  const int degree = series_degree(result.spectral, frobenius, tolerance);
  if (degree == 0) return result;
  const T* powers[3] = {E, E2, E3};
  series_terms(0, 3, powers, r, F);
  if (degree == 4) {
    series_terms(2, 3, powers, r, head);
    for (int64_t i = 0; i < count; ++i) F[i] = static_cast<T>(kSeries[1]) * E[i];
    multiply(E2, head, r, product);
  } else if (degree > 4) {
    multiply(E2, E, r, E3);
    series_terms(degree - 3, 4, powers, r, head);
    multiply(E3, head, r, product);
    if (degree == 9) {
      series_terms(3, 3, powers, r, head);
      for (int64_t i = 0; i < count; ++i) head[i] += product[i];
      multiply(E3, head, r, product);
    }
  }
  if (degree > 2)
    for (int64_t i = 0; i < count; ++i) F[i] += product[i];
  result.found = true;
  result.residual = series_residual(degree, result.spectral, frobenius);
  return result;
}

}  // namespace stella::STELLA_ISA

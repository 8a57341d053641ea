// Small square matrices: r x r, row-major, the leading dimension padded to the vector and the rows to four.
#pragma once

#include "common/microkernels.h"

namespace stella::STELLA_ISA {

template <typename T = double>
STELLA_INLINE int64_t square_leading(int64_t r) {
  return round_up(r, kLanes<T>);
}

template <typename T = double>
STELLA_INLINE int64_t square_size(int64_t r) {
  return round_up(r, kCombineColumns) * square_leading<T>(r);
}

STELLA_INLINE double absolute(double x) { return x < 0 ? -x : x; }
STELLA_INLINE bool is_finite(double x) { return x - x == 0.0; }

// Adds the sum of a_i b_i over whole vectors V to `total`; returns how many values those are.
template <typename V, typename T>
STELLA_INLINE int64_t add_products(const T* a, const T* b, int64_t n, T* total) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  if (n < lanes) return 0;  // nothing to reduce: in short rows that would be most of the work
  V sum = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sum += load<V>(a + i) * load<V>(b + i);
  for (int lane = 0; lane < lanes; ++lane) *total += sum[lane];
  return i;
}

// Sums of long vectors in pairs of halves, down to 32 terms of each lane: the round-offs of equal terms are equal, and
// a sum of thousands in turn would lose as many units.
template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t kLongest = 32 * kLanes<T>;
  if (n > kLongest) {
    const int64_t half = round_up(n / 2, kLongest);
    return dot(a, b, half) + dot(a + half, b + half, n - half);
  }
  T total = 0;
  int64_t i = add_products<Vector<T>>(a, b, n, &total);
  i += add_products<Four<T>>(a + i, b + i, n - i, &total);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// out = a^T b for r x r matrices with leading dimension square_leading<T>(r), rows padded to four.
template <typename T>
void multiply(const T* a, const T* b, int64_t r, T* out) {
  const int64_t leading = square_leading<T>(r);
  T* blocked = scratch().coefficients.reserve<T>(round_up(r, kCombineColumns) * r);
  block_coefficients(a, leading, r, r, blocked);
  combine<T>(b, r, leading, blocked, r, nullptr, out, leading, leading);
}

// ||a - shift I||_F
template <typename T>
double frobenius_norm(const T* a, int64_t r, T shift = 0) {
  const int64_t leading = square_leading<T>(r);
  double sum = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    const T* row = a + i * leading;
    if (shift == T(0)) {
      sum += static_cast<double>(dot(row, row, r));
      continue;
    }
    const T off = row[i] - shift;
    sum += static_cast<double>(dot(row, row, i) + dot(row + i + 1, row + i + 1, r - i - 1) + off * off);
  }
  return __builtin_sqrt(sum);
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

}  // namespace stella::STELLA_ISA

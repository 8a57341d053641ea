// Contiguous float32 rows of 4 or 8: a vector holds one or several whole ones, and products within a row are products
// of vectors with permutations of themselves.
#pragma once

#include "stiefel/row_kernels.h"

namespace stella::STELLA_ISA {
namespace {

// Each run of r lanes rotated left by `by`.
template <int r, int by, typename V, int... lane>
STELLA_INLINE V rotate_runs(V v, std::integer_sequence<int, lane...>) {
  return permute<(lane / r * r + (lane + by) % r)...>(v);
}

// Every lane from the one whose number differs in the bits of `apart`.
template <int apart, typename V, int... lane>
STELLA_INLINE V exchange(V v, std::integer_sequence<int, lane...>) {
  return permute<(lane ^ apart)...>(v);
}

template <int r, typename V, int... by>
STELLA_INLINE void add_rotations(V v, V* sums, std::integer_sequence<int, by...>) {
  constexpr auto all = std::make_integer_sequence<int, kWidest>();
  ((sums[by] += v * rotate_runs<r, by>(v, all)), ...);
}

// Upper triangle of gram (r x r) += a^T a: the products of a row with its own rotations by up to half of it are all.
template <int r>
void gram_of_short_rows(const float* a, int64_t rows, double* gram) {
  constexpr int kPerVector = kWidest / r, kRotations = r / 2 + 1, kSets = r == 4 ? 2 : 1;  // sets hide the latency
  constexpr int64_t kTogether = kSets * kPerVector;
  using V = Vector<float>;
  using Wide = typename VectorOf<double, kWidest>::type;
  constexpr auto rotations = std::make_integer_sequence<int, kRotations>();
  constexpr int64_t kPart = kFloatSumTerms * kTogether;
  Wide totals[kRotations] = {};
  V parts[kRotations] = {};
  for (int64_t begin = 0; begin < rows; begin += kPart) {
    const int64_t end = rows - begin < kPart ? rows : begin + kPart;
    const bool whole = end == rows || end % (8 * kPart) == 0;
    V sums[kSets][kRotations] = {};
    int64_t i = begin;
    for (; i + kTogether <= end; i += kTogether)
#pragma GCC unroll 2
      for (int set = 0; set < kSets; ++set) add_rotations<r>(load<V>(a + i * r + set * kWidest), sums[set], rotations);
    if (i < end) {
      float last[kSets * kWidest] = {};
      std::memcpy(last, a + i * r, static_cast<size_t>((end - i) * r) * sizeof(float));
      for (int set = 0; set < kSets; ++set) add_rotations<r>(load<V>(last + set * kWidest), sums[set], rotations);
    }
#pragma GCC unroll 8
    for (int by = 0; by < kRotations; ++by) {
      if constexpr (kSets == 2) sums[0][by] += sums[1][by];
      parts[by] += sums[0][by];
      if (!whole) continue;
      totals[by] += __builtin_convertvector(parts[by], Wide);
      parts[by] = V{};
    }
  }
  for (int by = 0; by < kRotations; ++by)
    for (int lane = 0; lane < kWidest; ++lane) {
      const int j = lane % r, k = (j + by) % r;
      if (2 * by == r && j >= k) continue;  // each product of these is there twice
      gram[(j < k ? j : k) * r + (j < k ? k : j)] += totals[by][lane];
    }
}

// Rows times an (r x r) matrix. A lane exchanged within four has met four rows of the matrix; for rows of eight the
// sums of the other half of the columns are made in the same place, and exchanged once at the end.
template <int r>
class ShortRowProduct {
 public:
  explicit ShortRowProduct(const double* matrix) {
    for (int half = 0; half < kHalves; ++half)
      for (int apart = 0; apart < 4; ++apart)
        for (int lane = 0; lane < kWidest; ++lane) {
          const int from = lane % r ^ apart, to = lane % r ^ 4 * half;
          factors_[half][apart][lane] = static_cast<float>(matrix[from * r + to]);
        }
  }

  template <bool streamed>
  void operator()(const float* from, int64_t rows, float* to) const {
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kPerVector <= rows; i += kPerVector) {
      const V product = of(load<V>(from + i * r));
      if constexpr (streamed)
        stream(to + i * r, product);
      else
        store(to + i * r, product);
    }
    if (i == rows) return;
    float last[kWidest] = {};
    const size_t bytes = static_cast<size_t>((rows - i) * r) * sizeof(float);
    std::memcpy(last, from + i * r, bytes);
    store(last, of(load<V>(last)));
    std::memcpy(to + i * r, last, bytes);
  }

 private:
  using V = Vector<float>;
  static constexpr int kPerVector = kWidest / r, kHalves = r / 4;

  STELLA_INLINE V of(V v) const {
    constexpr auto all = std::make_integer_sequence<int, kWidest>();
    const V by[4] = {v, exchange<1>(v, all), exchange<2>(v, all), exchange<3>(v, all)};
    V sums[kHalves];
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half)
      sums[half] =
          by[0] * factors_[half][0] + by[1] * factors_[half][1] + by[2] * factors_[half][2] + by[3] * factors_[half][3];
    if constexpr (kHalves == 2) sums[0] += exchange<4>(sums[1], all);
    return sums[0];
  }

  V factors_[kHalves][4];
};

// body(std::integral_constant<int, r>) for rows that are short.
template <typename Body>
STELLA_INLINE void for_short_row(int64_t r, Body&& body) {
  if constexpr (is_short_row(4))
    if (r == 4) body(std::integral_constant<int, 4>());
  if constexpr (is_short_row(8))
    if (r == 8) body(std::integral_constant<int, 8>());
  (void)r, (void)body;
}

}  // namespace
}  // namespace stella::STELLA_ISA

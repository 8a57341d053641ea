// A float32 matrix whose rows are whole vectors: its update straight from the rows, and, where a row is one vector
// (r = 8 for AVX2), its Gram matrix too. Nothing is packed, and reading memory overlaps with the arithmetic.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "panel.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int kRowLanes = kLanes<float>;
constexpr int64_t kRowRanks = 64;  // beyond, the coefficients no longer stay in L1 beside the rows

bool rows_are_vectors(const MatrixView& view) {
  return view.storage == Storage::float32 && view.col_stride == 1 && view.r % kRowLanes == 0 && view.r <= kRowRanks;
}

// Adds the Gram matrix of rows [begin, end) of one vector each to `gram` (r x r); float32 sums over a few hundred rows,
// float64 beyond.
void gram_of_rows(const MatrixView& view, int64_t begin, int64_t end, double* gram) {
  constexpr int64_t kRun = 256;
  using V = Vector<float>;
  const float* data = static_cast<const float*>(view.data);
  for (int64_t start = begin; start < end; start += kRun) {
    const int64_t stop = end - start < kRun ? end : start + kRun;
    V sums[kRowLanes] = {};
    for (int64_t i = start; i < stop; ++i) {
      const float* row = data + i * view.row_stride;
      const V values = load<V>(row);
#pragma GCC unroll 16
      for (int k = 0; k < kRowLanes; ++k) sums[k] += values * row[k];
    }
    for (int k = 0; k < kRowLanes; ++k)
      for (int j = k; j < kRowLanes; ++j) gram[k * kRowLanes + j] += static_cast<double>(sums[k][j]);
  }
}

// Stores past the cache, which spares reading the line first; `to` is aligned to the vector.
STELLA_INLINE void stream(float* to, Vector<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(to, reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(to, reinterpret_cast<__m128>(v));
#else
  store(to, v);
#endif
}

bool can_stream(const MatrixView& out) {
  return reinterpret_cast<uintptr_t>(out.data) % STELLA_VECTOR_BYTES == 0 && out.row_stride % kRowLanes == 0;
}

// `rows` rows of `vectors` vectors of out = in * coefficients; the coefficients have r columns.
template <int rows, int vectors, bool streamed>
STELLA_INLINE void update_tile(const float* from, int64_t from_stride, int64_t r, const float* coefficients, float* to,
                               int64_t to_stride) {
  using V = Vector<float>;
  V sums[rows][vectors] = {};
  for (int64_t k = 0; k < r; ++k) {
    V c[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) c[v] = load<V>(coefficients + k * r + v * kRowLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const float value = from[i * from_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[i][v] += c[v] * value;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      if constexpr (streamed)
        stream(to + i * to_stride + v * kRowLanes, sums[i][v]);
      else
        store(to + i * to_stride + v * kRowLanes, sums[i][v]);
    }
}

template <int rows, bool streamed>
STELLA_INLINE void update_some_rows(const float* from, int64_t from_stride, int64_t r, const float* coefficients,
                                    float* to, int64_t to_stride) {
  int64_t j = 0;
  for (; j + 2 * kRowLanes <= r; j += 2 * kRowLanes)
    update_tile<rows, 2, streamed>(from, from_stride, r, coefficients + j, to + j, to_stride);
  if (j < r) update_tile<rows, 1, streamed>(from, from_stride, r, coefficients + j, to + j, to_stride);
}

template <bool streamed>
void update_rows(const float* from, int64_t from_stride, int64_t r, const float* coefficients, float* to,
                 int64_t to_stride, int64_t rows, const float* upcoming) {
  constexpr int kTogether = 6;
  int64_t i = 0;
  for (; i + kTogether <= rows; i += kTogether) {
    if (upcoming)
      for (int64_t k = 0; k < kTogether * r; k += 16) __builtin_prefetch(upcoming + i * r + k, 0, 2);
    update_some_rows<kTogether, streamed>(from + i * from_stride, from_stride, r, coefficients, to + i * to_stride,
                                          to_stride);
  }
  for (; i < rows; ++i)
    update_some_rows<1, streamed>(from + i * from_stride, from_stride, r, coefficients, to + i * to_stride, to_stride);
}

// out = in * coefficients (r x r, row-major) on rows [begin, end); `streamed` asks for stores past the cache.
void update_of_rows(const MatrixView& in, const MatrixView& out, int64_t begin, int64_t end, const double* coefficients,
                    bool streamed, const void* upcoming) {
  const int64_t r = in.r;
  float* c = scratch().coefficients.reserve<float>(r * r);
  for (int64_t k = 0; k < r * r; ++k) c[k] = static_cast<float>(coefficients[k]);
  const float* from = static_cast<const float*>(in.data) + begin * in.row_stride;
  float* to = static_cast<float*>(out.data) + begin * out.row_stride;
  const float* next = upcoming ? static_cast<const float*>(upcoming) + begin * r : nullptr;
  if (streamed && can_stream(out)) {
    update_rows<true>(from, in.row_stride, r, c, to, out.row_stride, end - begin, next);
#ifdef __SSE2__
    _mm_sfence();  // before other threads are told that the rows are there
#endif
  } else {
    update_rows<false>(from, in.row_stride, r, c, to, out.row_stride, end - begin, next);
  }
}

}  // namespace
}  // namespace stella::STELLA_ISA

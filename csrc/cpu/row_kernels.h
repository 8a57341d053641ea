// A float32 matrix whose rows are whole vectors: its update straight from the rows, and, where a row is one vector
// (r = 8 for AVX2), its Gram matrix too. Nothing is packed, and reading memory overlaps with the arithmetic.
#pragma once

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

// `rows` rows of `vectors` vectors of out = in * coefficients; the coefficients have r columns.
template <int rows, int vectors>
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
    for (int v = 0; v < vectors; ++v) store(to + i * to_stride + v * kRowLanes, sums[i][v]);
}

template <int rows>
STELLA_INLINE void update_some_rows(const float* from, int64_t from_stride, int64_t r, const float* coefficients,
                                    float* to, int64_t to_stride) {
  int64_t j = 0;
  for (; j + 2 * kRowLanes <= r; j += 2 * kRowLanes)
    update_tile<rows, 2>(from, from_stride, r, coefficients + j, to + j, to_stride);
  if (j < r) update_tile<rows, 1>(from, from_stride, r, coefficients + j, to + j, to_stride);
}

// out = in * coefficients (r x r, row-major) on rows [begin, end).
void update_of_rows(const MatrixView& in, const MatrixView& out, int64_t begin, int64_t end,
                    const double* coefficients) {
  constexpr int kTogether = 6;
  const int64_t r = in.r;
  float* c = scratch().coefficients.reserve<float>(r * r);
  for (int64_t k = 0; k < r * r; ++k) c[k] = static_cast<float>(coefficients[k]);
  const float* from = static_cast<const float*>(in.data);
  float* to = static_cast<float*>(out.data);
  int64_t i = begin;
  for (; i + kTogether <= end; i += kTogether)
    update_some_rows<kTogether>(from + i * in.row_stride, in.row_stride, r, c, to + i * out.row_stride, out.row_stride);
  for (; i < end; ++i)
    update_some_rows<1>(from + i * in.row_stride, in.row_stride, r, c, to + i * out.row_stride, out.row_stride);
}

}  // namespace
}  // namespace stella::STELLA_ISA

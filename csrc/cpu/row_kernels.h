// A float32 matrix whose rows are one vector each (r = 8 for AVX2): its Gram matrix and its update straight from the
// rows. Nothing is packed, and reading memory overlaps with the arithmetic, of which such a matrix needs little.
#pragma once

#include "panel.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int kRowLanes = kLanes<float>;

bool row_is_vector(const MatrixView& view) {
  return view.storage == Storage::float32 && view.col_stride == 1 && view.r == kRowLanes;
}

// Adds the Gram matrix of rows [begin, end) to `gram` (r x r); float32 sums over a few hundred rows, float64 beyond.
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

// out = in * coefficients (r x r, row-major) on rows [begin, end).
void update_of_rows(const MatrixView& in, const MatrixView& out, int64_t begin, int64_t end,
                    const double* coefficients) {
  constexpr int kTogether = 6;
  using V = Vector<float>;
  V c[kRowLanes];
  for (int k = 0; k < kRowLanes; ++k)
    for (int j = 0; j < kRowLanes; ++j) c[k][j] = static_cast<float>(coefficients[k * kRowLanes + j]);
  const float* from = static_cast<const float*>(in.data);
  float* to = static_cast<float*>(out.data);
  int64_t i = begin;
  for (; i + kTogether <= end; i += kTogether) {
    V sums[kTogether] = {};
#pragma GCC unroll 16
    for (int k = 0; k < kRowLanes; ++k)
#pragma GCC unroll 8
      for (int q = 0; q < kTogether; ++q) sums[q] += c[k] * from[(i + q) * in.row_stride + k];
#pragma GCC unroll 8
    for (int q = 0; q < kTogether; ++q) store(to + (i + q) * out.row_stride, sums[q]);
  }
  for (; i < end; ++i) {
    V sum = {};
    for (int k = 0; k < kRowLanes; ++k) sum += c[k] * from[i * in.row_stride + k];
    store(to + i * out.row_stride, sum);
  }
}

}  // namespace
}  // namespace stella::STELLA_ISA

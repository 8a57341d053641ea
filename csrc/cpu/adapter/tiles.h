// The pieces of the adapter's products: rows of activations against packed factors.
#pragma once

#include <type_traits>

#include "adapter/philox.h"
#include "common/microkernels.h"
#include "common/panel.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int64_t kTileRows = kCombineColumns;  // rows of activations that a register tile takes

template <typename T, int columns>
STELLA_INLINE void dot_tile(const T* a, int64_t a_leading, const T* b, int64_t b_leading, int64_t count, double* out,
                            int64_t order) {
  using V = Vector<T>;
  V sums[kTileRows][columns] = {};
  for (int64_t k = 0; k < count; k += kLanes<T>) {
    V right[columns];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) right[j] = load<V>(b + j * b_leading + k);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const V left = load<V>(a + i * a_leading + k);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j) {
    const Four<T> totals = sum_lanes<T, kLanes<T>>(sums[0][j], sums[1][j], sums[2][j], sums[3][j]);
    for (int i = 0; i < kTileRows; ++i) out[i * order + j] += static_cast<double>(totals[i]);
  }
}

// out[i, j] += a_i . b_j, four rows of `a`, `columns` rows of `b`; count is a multiple of the vector.
template <typename T>
void dot_rows(const T* a, int64_t a_leading, const T* b, int64_t b_leading, int64_t columns, int64_t count, double* out,
              int64_t order) {
  int64_t j = 0;
  for (; j + kGramRows <= columns; j += kGramRows)
    dot_tile<T, kGramRows>(a, a_leading, b + j * b_leading, b_leading, count, out + j, order);
  if constexpr (kGramRows > 3) {
    if (columns - j >= 3) {
      dot_tile<T, 3>(a, a_leading, b + j * b_leading, b_leading, count, out + j, order);
      j += 3;
    }
  }
  if (columns - j == 2)
    dot_tile<T, 2>(a, a_leading, b + j * b_leading, b_leading, count, out + j, order);
  else if (columns - j == 1)
    dot_tile<T, 1>(a, a_leading, b + j * b_leading, b_leading, count, out + j, order);
}

// Columns [begin, begin + count) of one row of activations, widened, dropped out where there is a mask, zeros up to
// `padded`.
template <typename T>
void pack_row(const MatrixView& x, int64_t row, int64_t begin, int64_t count, int64_t padded, const uint32_t* mask,
              T scale, T* to) {
  with_storage(x, [&](auto* data) {
    const auto* from = data + row * x.row_stride + begin * x.col_stride;
    if (x.col_stride != 1) {
      for (int64_t i = 0; i < count; ++i) {
        const T value = static_cast<T>(widen(from[i * x.col_stride])) * scale;
        to[i] = mask ? kept(value, mask[i]) : value;
      }
    } else if (mask) {
      for (int64_t i = 0; i < count; ++i) to[i] = kept(static_cast<T>(widen(from[i])) * scale, mask[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
    }
  });
  for (int64_t i = count; i < padded; ++i) to[i] = T(0);
}

// Asks for columns [begin, begin + count) of up to four rows, which are read soon: short runs, far apart.
STELLA_INLINE void fetch_rows(const MatrixView& x, int64_t row, int64_t end, int64_t begin, int64_t count) {
  if (x.col_stride != 1) return;
  const int64_t bytes = bytes_of(x.storage);
  for (int64_t i = row; i < end && i < row + kTileRows; ++i) {
    const char* from = static_cast<const char*>(x.data) + (i * x.row_stride + begin) * bytes;
    for (int64_t b = 0; b < count * bytes; b += 64) __builtin_prefetch(from + b, 0, 2);
  }
}

// Whether its rows are contiguous, in the arithmetic type: tiles are read and written where they lie.
template <typename T>
bool is_panel(const MatrixView& x) {
  return x.col_stride == 1 && x.storage == (std::is_same_v<T, float> ? Storage::float32 : Storage::float64);
}

// to = keep * to + values * scale where kept, values where there is no mask; `keep` 0 ignores what was there.
template <typename T, typename S>
void add_row(S* to, int64_t stride, const T* values, const T* bias, const uint32_t* mask, T scale, T keep,
             int64_t count) {
  auto loop = [&](auto&& value) {
    if (stride != 1) {
      for (int64_t i = 0; i < count; ++i) {
        const T before = keep == T(0) ? T(0) : keep * static_cast<T>(widen(to[i * stride]));
        to[i * stride] = Narrow<S>::from(before + value(i));
      }
    } else if (keep == T(0)) {
      for (int64_t i = 0; i < count; ++i) to[i] = Narrow<S>::from(value(i));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = Narrow<S>::from(keep * static_cast<T>(widen(to[i])) + value(i));
    }
  };
  if (mask)
    loop([&](int64_t i) { return kept(values[i] * scale, mask[i]); });
  else if (bias)
    loop([&](int64_t i) { return values[i] + bias[i]; });
  else
    loop([&](int64_t i) { return values[i]; });
}

// Full vectors past the cache, the rest as usual; `to` may start anywhere in a line.
STELLA_INLINE void stream_row(float* to, const float* values, int64_t count) {
  int64_t i = 0;
#ifdef __SSE2__
  while (i < count && reinterpret_cast<uintptr_t>(to + i) % 16 != 0) {
    to[i] = values[i];
    ++i;
  }
  for (; i + 4 <= count; i += 4) stream_part(to + i, values + i);
#endif
  for (; i < count; ++i) to[i] = values[i];
}

// Row-major (rows, r) values to the coefficients of `combine` with the rows as its columns: blocks of four rows.
template <typename T, typename F>
void block_rows(int64_t rows, int64_t r, F&& value, T* to) {
  for (int64_t i = 0; i < rows; i += kTileRows)
    for (int64_t j = 0; j < r; ++j)
      for (int64_t k = 0; k < kTileRows; ++k) *to++ = i + k < rows ? value(i + k, j) : T(0);
}

// The same with the rows as its terms: blocks of four columns.
template <typename T, typename F>
void block_columns(int64_t rows, int64_t r, F&& value, T* to) {
  for (int64_t j = 0; j < r; j += kTileRows)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < kTileRows; ++k) *to++ = j + k < r ? value(i, j + k) : T(0);
}

}  // namespace
}  // namespace stella::STELLA_ISA

// The two products everything is made of, on packed columns: Gram blocks (columns against columns, summed along n)
// and combinations (new columns as sums of old ones). Register tiles are sized to the instruction set's registers.
#pragma once

#include "scratch.h"
#include "vector.h"

namespace stella::STELLA_ISA {

constexpr int kGramRows = 4;
constexpr int kGramColumns = kRegisters == 32 ? 6 : 3;
constexpr int kCombineColumns = 4;
constexpr int kCombineVectors = kRegisters == 32 ? 6 : 3;

template <typename T, int columns>
STELLA_INLINE void gram_tile(const T* a, const T* b, int64_t leading, int64_t count, T (*sums)[kGramRows]) {
  using V = Vector<T>;
  V accumulator[kGramRows][columns] = {};
  for (int64_t k = 0; k < count; k += kLanes<T>) {
    V right[columns];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) right[j] = load<V>(b + j * leading + k);
#pragma GCC unroll 8
    for (int i = 0; i < kGramRows; ++i) {
      const V left = load<V>(a + i * leading + k);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) accumulator[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < columns; ++j)
    sum_lanes<T, kLanes<T>>(accumulator[0][j], accumulator[1][j], accumulator[2][j], accumulator[3][j], sums[j]);
}

template <typename T, int columns>
void gram_columns(const T* a, const T* b, int64_t leading, int64_t count, int64_t rows, double* gram, int64_t order) {
  T sums[columns][kGramRows];
  gram_tile<T, columns>(a, b, leading, count, sums);
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) gram[i * order + j] += static_cast<double>(sums[j][i]);
}

// gram[i, j] += a_i . b_j for i in [first, rows), j in [max(i's tile, 0), columns). `a` has rows padded to four.
template <typename T>
void gram_block(const T* a, int64_t rows, const T* b, int64_t columns, int64_t leading, int64_t count, double* gram,
                int64_t order, bool upper_only) {
  for (int64_t i = 0; i < rows; i += kGramRows) {
    const int64_t tile_rows = rows - i < kGramRows ? rows - i : kGramRows;
    int64_t j = upper_only ? i : 0;
    const T* left = a + i * leading;
    for (; j + kGramColumns <= columns; j += kGramColumns)
      gram_columns<T, kGramColumns>(left, b + j * leading, leading, count, tile_rows, gram + i * order + j, order);
    if constexpr (kGramColumns > 3) {
      if (columns - j >= 3) {
        gram_columns<T, 3>(left, b + j * leading, leading, count, tile_rows, gram + i * order + j, order);
        j += 3;
      }
    }
    if (columns - j == 2)
      gram_columns<T, 2>(left, b + j * leading, leading, count, tile_rows, gram + i * order + j, order);
    else if (columns - j == 1)
      gram_columns<T, 1>(left, b + j * leading, leading, count, tile_rows, gram + i * order + j, order);
  }
}

template <typename T, int vectors>
STELLA_INLINE void combine_tile(const T* panel, int64_t terms, int64_t leading, const T* coefficients, const T* base,
                                T* out, int64_t out_leading) {
  using V = Vector<T>;
  V accumulator[kCombineColumns][vectors];
#pragma GCC unroll 8
  for (int j = 0; j < kCombineColumns; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) accumulator[j][v] = base ? load<V>(base + j * leading + v * kLanes<T>) : V{};
  for (int64_t k = 0; k < terms; ++k) {
    V column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) column[v] = load<V>(panel + k * leading + v * kLanes<T>);
#pragma GCC unroll 8
    for (int j = 0; j < kCombineColumns; ++j) {
      const T c = coefficients[k * kCombineColumns + j];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) accumulator[j][v] += column[v] * c;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kCombineColumns; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(out + j * out_leading + v * kLanes<T>, accumulator[j][v]);
}

// out_j = base_j + sum_k panel_k coefficients[k, j] over `count` rows (a multiple of the vector). `coefficients` is
// blocked as block_coefficients leaves it; `out` and `base` have columns padded to four.
template <typename T>
void combine(const T* panel, int64_t terms, int64_t leading, const T* coefficients, int64_t columns, const T* base,
             T* out, int64_t out_leading, int64_t count) {
  constexpr int64_t kStep = kCombineVectors * kLanes<T>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int64_t j = 0; j < columns; j += kCombineColumns)
      combine_tile<T, kCombineVectors>(panel + i, terms, leading, coefficients + j * terms,
                                       base ? base + j * leading + i : nullptr, out + j * out_leading + i, out_leading);
  for (; i < count; i += kLanes<T>)
    for (int64_t j = 0; j < columns; j += kCombineColumns)
      combine_tile<T, 1>(panel + i, terms, leading, coefficients + j * terms, base ? base + j * leading + i : nullptr,
                         out + j * out_leading + i, out_leading);
}

// (terms, columns) row-major coefficients to blocks of four columns, zero-padded, in the arithmetic type.
template <typename S, typename T>
void block_coefficients(const S* from, int64_t from_leading, int64_t terms, int64_t columns, T* to) {
  for (int64_t j = 0; j < columns; j += kCombineColumns)
    for (int64_t k = 0; k < terms; ++k, to += kCombineColumns) {
      const S* four = from + k * from_leading + j;
      if (columns - j >= kCombineColumns)
        for (int c = 0; c < kCombineColumns; ++c) to[c] = static_cast<T>(four[c]);
      else
        for (int c = 0; c < kCombineColumns; ++c) to[c] = j + c < columns ? static_cast<T>(four[c]) : T(0);
    }
}

}  // namespace stella::STELLA_ISA

// The two products everything is made of, on packed columns: Gram blocks (columns against columns, summed along n)
// and combinations (new columns as sums of old ones). Register tiles are sized to the instruction set's registers.
#pragma once

#include <type_traits>

#include "scratch.h"
#include "vector.h"

namespace stella::STELLA_ISA {

constexpr int kGramRows = kRegisters == 32 ? 6 : 3;
constexpr int kGramColumns = 4;
constexpr int64_t kGramBlockBytes = 24 << 10;  // columns that stay in L1 while all rows of tiles go past them
constexpr int kCombineColumns = 4;
constexpr int kCombineVectors = kRegisters == 32 ? 6 : 3;
constexpr int64_t kCombineTerms = 64;  // of which a tile's rows stay in L1 while all columns are made of them

// gram[i, j] += a_i . b_j for `rows` columns of a and four of b, of which the first `columns` are written.
template <typename T, int rows>
void gram_tile(const T* a, const T* b, int64_t leading, int64_t count, int64_t columns, double* gram, int64_t order) {
  using V = Vector<T>;
  V accumulator[rows][kGramColumns] = {};
  for (int64_t k = 0; k < count; k += kLanes<T>) {
    V right[kGramColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kGramColumns; ++j) right[j] = load<V>(b + j * leading + k);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V left = load<V>(a + i * leading + k);
#pragma GCC unroll 8
      for (int j = 0; j < kGramColumns; ++j) accumulator[i][j] += left * right[j];
    }
  }
  Four<T> sums[rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    sums[i] = sum_lanes<T, kLanes<T>>(accumulator[i][0], accumulator[i][1], accumulator[i][2], accumulator[i][3]);
  if (columns >= kGramColumns) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      double* to = gram + i * order;
      store(to, load<Four<double>>(to) + __builtin_convertvector(sums[i], Four<double>));
    }
  } else {
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) gram[i * order + j] += static_cast<double>(sums[i][j]);
  }
}

// gram[i, j] += a_i . b_j for `columns` columns of b from column `at` on; of `upper`, those at or right of row i's
// tile.
template <typename T, int rows>
STELLA_INLINE void gram_row(const T* a, const T* b, int64_t at, int64_t i, int64_t columns, int64_t leading,
                            int64_t count, double* gram, int64_t order, bool upper) {
  int64_t j = upper && i > at ? i - i % kGramColumns : at;
  for (; j < columns; j += kGramColumns)
    gram_tile<T, rows>(a + i * leading, b + j * leading, leading, count, columns - j, gram + i * order + j, order);
}

// gram[i, j] += a_i . b_j for i < rows, j < columns; with `upper`, at least for i <= j. `b` has columns padded to four.
template <typename T>
void gram_block(const T* a, int64_t rows, const T* b, int64_t columns, int64_t leading, int64_t count, double* gram,
                int64_t order, bool upper) {
  const int64_t fit = kGramBlockBytes / (leading * static_cast<int64_t>(sizeof(T))) / kGramColumns * kGramColumns;
  const int64_t step = fit < kGramColumns ? kGramColumns : fit;
  for (int64_t at = 0; at < columns; at += step) {
    const int64_t end = columns - at < step ? columns : at + step, last = upper && end < rows ? end : rows;
    int64_t i = 0;
    for (; i < last && i + kGramRows <= rows; i += kGramRows)  // past the last row is lower triangle, and harmless
      gram_row<T, kGramRows>(a, b, at, i, end, leading, count, gram, order, upper);
    if constexpr (kGramRows > 3) {
      if (last - i >= 3) {
        gram_row<T, 3>(a, b, at, i, end, leading, count, gram, order, upper);
        i += 3;
      }
    }
    if (last - i == 2)
      gram_row<T, 2>(a, b, at, i, end, leading, count, gram, order, upper);
    else if (last - i == 1)
      gram_row<T, 1>(a, b, at, i, end, leading, count, gram, order, upper);
  }
}

template <typename T, int vectors>
STELLA_INLINE void combine_tile(const T* panel, int64_t terms, int64_t leading, const T* coefficients, const T* base,
                                int64_t base_leading, T* out, int64_t out_leading) {
  using V = Vector<T>;
  V accumulator[kCombineColumns][vectors];
#pragma GCC unroll 8
  for (int j = 0; j < kCombineColumns; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) accumulator[j][v] = base ? load<V>(base + j * base_leading + v * kLanes<T>) : V{};
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

// `columns` columns of `vectors` vectors, as combine says.
template <typename T, int vectors>
STELLA_INLINE void combine_rows(const T* panel, int64_t terms, int64_t leading, const T* coefficients, int64_t columns,
                                const T* base, int64_t base_leading, T* out, int64_t out_leading) {
  for (int64_t k = 0; k < terms; k += kCombineTerms) {
    const int64_t some = terms - k < kCombineTerms ? terms - k : kCombineTerms;
    for (int64_t j = 0; j < columns; j += kCombineColumns)
      combine_tile<T, vectors>(panel + k * leading, some, leading, coefficients + j * terms + k * kCombineColumns,
                               base ? base + j * base_leading : nullptr, base_leading, out + j * out_leading,
                               out_leading);
    base = out;
    base_leading = out_leading;
  }
}

// out_j = base_j + sum_k panel_k coefficients[k, j] over `count` rows (a multiple of the vector). `coefficients` is
// blocked as block_coefficients leaves it; `out` and `base` have columns padded to four. `out` may be the base.
template <typename T>
void combine(const T* panel, int64_t terms, int64_t leading, const T* coefficients, int64_t columns, const T* base,
             T* out, int64_t out_leading, int64_t count) {
  constexpr int64_t kStep = kCombineVectors * kLanes<T>;
  const auto some = [&](auto vectors, int64_t i) {
    combine_rows<T, decltype(vectors)::value>(panel + i, terms, leading, coefficients, columns,
                                              base ? base + i : nullptr, leading, out + i, out_leading);
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) some(std::integral_constant<int, kCombineVectors>(), i);
  if constexpr (kCombineVectors > 3)
    if (count - i >= 3 * kLanes<T>) {
      some(std::integral_constant<int, 3>(), i);
      i += 3 * kLanes<T>;
    }
  if (count - i == 2 * kLanes<T>)
    some(std::integral_constant<int, 2>(), i);
  else if (count - i == kLanes<T>)
    some(std::integral_constant<int, 1>(), i);
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

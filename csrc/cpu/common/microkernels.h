// The two products everything is made of, on packed columns: Gram blocks (columns against columns, summed along n)
// and combinations (new columns as sums of old ones). Register tiles are sized to the instruction set's registers.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/scratch.h"
#include "common/vector.h"

namespace stella::STELLA_ISA {

constexpr int kGramRows = kRegisters == 32 ? 6 : 3;
constexpr int kGramColumns = 4;
constexpr int64_t kFloatSumTerms = 32;         // of one sign, added up before their sum is added to others
constexpr int64_t kGramBlockBytes = 24 << 10;  // columns that stay in L1 while all rows of tiles go past them
constexpr int kCombineColumns = 4;
constexpr int kCombineVectors = kRegisters == 32 ? 6 : 3;
constexpr int64_t kCombineTerms = 64;  // of which a tile's rows stay in L1 while all columns are made of them

// gram[i, j] += a_i . b_j for `rows` columns of a and four of b, of which the first `columns` are written.
template <typename T, int rows>
void gram_tile(const T* a, int64_t a_leading, const T* b, int64_t b_leading, int64_t count, int64_t columns,
               double* gram, int64_t order) {
  using V = Vector<T>;
  V accumulator[rows][kGramColumns] = {};
  for (int64_t k = 0; k < count; k += kLanes<T>) {
    V right[kGramColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kGramColumns; ++j) right[j] = load<V>(b + j * b_leading + k);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V left = load<V>(a + i * a_leading + k);
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
STELLA_INLINE void gram_row(const T* a, int64_t a_leading, const T* b, int64_t b_leading, int64_t at, int64_t i,
                            int64_t columns, int64_t count, double* gram, int64_t order, bool upper) {
  int64_t j = upper && i > at ? i - i % kGramColumns : at;
  for (; j < columns; j += kGramColumns) {
    // On the diagonal all terms have one sign, and if they are alike their round-offs do too: shorter sums there.
    const int64_t step = (upper && j < i + rows ? 1 : 3) * kFloatSumTerms * kLanes<T>;
    for (int64_t k = 0; k < count; k += step)
      gram_tile<T, rows>(a + i * a_leading + k, a_leading, b + j * b_leading + k, b_leading,
                         count - k < step ? count - k : step, columns - j, gram + i * order + j, order);
  }
}

// gram[i, j] += a_i . b_j for i < rows, j < columns; with `upper`, at least for i <= j. `b` has columns padded to four.
template <typename T>
void gram_block(const T* a, int64_t a_leading, int64_t rows, const T* b, int64_t b_leading, int64_t columns,
                int64_t count, double* gram, int64_t order, bool upper) {
  const int64_t fit = kGramBlockBytes / (count * static_cast<int64_t>(sizeof(T)) + 64) / kGramColumns * kGramColumns;
  const int64_t step = fit < kGramColumns ? kGramColumns : fit;
  for (int64_t at = 0; at < columns; at += step) {
    const int64_t end = columns - at < step ? columns : at + step, last = upper && end < rows ? end : rows;
    int64_t i = 0;
    const auto row = [&](auto some) {
      gram_row<T, decltype(some)::value>(a, a_leading, b, b_leading, at, i, end, count, gram, order, upper);
      i += decltype(some)::value;
    };
    for (; i < last && i + kGramRows <= rows;) {  // past the last row is lower triangle, and harmless
      if (kGramRows == 6 && last - i == 8) break;
      row(std::integral_constant<int, kGramRows>());
    }
    if constexpr (kGramRows > 3) {
      while (last - i >= 4) row(std::integral_constant<int, 4>());
      if (last - i == 3) row(std::integral_constant<int, 3>());
    }
    if (last - i == 2)
      row(std::integral_constant<int, 2>());
    else if (last - i == 1)
      row(std::integral_constant<int, 1>());
  }
}

// What becomes of a combination's values before they are stored: nothing.
struct AsTheyAre {
  template <typename V>
  STELLA_INLINE V operator()(V values, int64_t, int64_t) const {
    return values;
  }
};

// Columns side by side, `leading` apart, that a combination sums up.
template <typename T>
struct Terms {
  const T* columns;
  int64_t count, leading;
};

template <typename T, int vectors>
STELLA_INLINE void add_terms(const Terms<T>& terms, const T* coefficients,
                             Vector<T> (&sums)[kCombineColumns][vectors]) {
  using V = Vector<T>;
  const T* from = terms.columns;
  for (int64_t k = 0; k < terms.count; ++k, from += terms.leading, coefficients += kCombineColumns) {
    V column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) column[v] = load<V>(from + v * kLanes<T>);
#pragma GCC unroll 8
    for (int j = 0; j < kCombineColumns; ++j) {
      const T c = coefficients[j];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[j][v] += column[v] * c;
    }
  }
}

// `columns` columns of `vectors` vectors, from row i on, as combine says.
template <typename T, int vectors, typename Finish>
STELLA_INLINE void combine_rows(const Terms<T>& first, const Terms<T>& second, const T* coefficients, int64_t columns,
                                const T* base, int64_t base_leading, T* out, int64_t out_leading, int64_t i,
                                const Finish& finish) {
  using V = Vector<T>;
  const int64_t terms = first.count + second.count;
  const bool together = terms <= kCombineTerms;
  const auto part = [&](const Terms<T>& a, const Terms<T>& b, int64_t from, bool last) {
    for (int64_t j = 0; j < columns; j += kCombineColumns) {
      const T* blocked = coefficients + j * terms + from * kCombineColumns;
      V sums[kCombineColumns][vectors];
#pragma GCC unroll 8
      for (int c = 0; c < kCombineColumns; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
          sums[c][v] = base ? load<V>(base + (j + c) * base_leading + i + v * kLanes<T>) : V{};
      add_terms<T, vectors>({a.columns + i, a.count, a.leading}, blocked, sums);
      if (b.count)
        add_terms<T, vectors>({b.columns + i, b.count, b.leading}, blocked + a.count * kCombineColumns, sums);
#pragma GCC unroll 8
      for (int c = 0; c < kCombineColumns; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const int64_t row = i + v * kLanes<T>;
          store(out + (j + c) * out_leading + row, last ? finish(sums[c][v], row, j + c) : sums[c][v]);
        }
    }
    base = out;
    base_leading = out_leading;
  };
  if (together) return part(first, second, 0, true);
  int64_t from = 0;
  for (const Terms<T>& all : {first, second})
    for (int64_t k = 0; k < all.count; k += kCombineTerms) {
      const int64_t some = all.count - k < kCombineTerms ? all.count - k : kCombineTerms;
      part({all.columns + k * all.leading, some, all.leading}, {nullptr, 0, 0}, from, from + some == terms);
      from += some;
    }
}

// out_j = finish(base_j + sum_k first_k coefficients[k, j] + those of the second, row, j) over `count` rows (a multiple
// of the vector). `coefficients` is blocked as block_coefficients leaves it; `out` and `base` have columns padded to
// four. `out` may be the base.
template <typename T, typename Finish = AsTheyAre>
void combine(const Terms<T>& first, const Terms<T>& second, const T* coefficients, int64_t columns, const T* base,
             int64_t base_leading, T* out, int64_t out_leading, int64_t count, const Finish& finish = Finish()) {
  constexpr int64_t kStep = kCombineVectors * kLanes<T>;
  const auto some = [&](auto vectors, int64_t i) {
    combine_rows<T, decltype(vectors)::value>(first, second, coefficients, columns, base, base_leading, out,
                                              out_leading, i, finish);
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

// Of one panel, with the base's columns as far apart as the panel's.
template <typename T>
void combine(const T* panel, int64_t terms, int64_t leading, const T* coefficients, int64_t columns, const T* base,
             T* out, int64_t out_leading, int64_t count) {
  combine<T>({panel, terms, leading}, {nullptr, 0, 0}, coefficients, columns, base, leading, out, out_leading, count);
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

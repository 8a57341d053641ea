// Float32 matrices whose rows are whole vectors, straight from the rows: nothing is packed, and reading memory overlaps
// with the arithmetic. Rows go through in chunks that stay in L1 from one product to the next. The columns of a row are
// cut into tiles: pairs of the widest vectors, then what is left by vectors of half the width each time.
#pragma once

#include "common/microkernels.h"
#include "common/panel.h"
#include "common/scratch.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int kWidest = kLanes<float>;
constexpr int kNarrowest = 4;
constexpr int64_t kRowRanks = 64;       // beyond, the coefficients no longer stay in L1 beside the rows
constexpr int64_t kFloatSumRows = 256;  // rows summed in float32 before the sum goes to float64

bool rows_are_vectors(const MatrixView& view, int64_t most = kRowRanks) {
  return view.storage == Storage::float32 && view.col_stride == 1 && view.r % kNarrowest == 0 && view.r <= most;
}

// Rows without gaps besides.
bool rows_are_contiguous(const MatrixView& view) { return rows_are_vectors(view) && view.row_stride == view.r; }

// Whether short_rows.h has a kernel for rows of r values.
constexpr bool is_short_row(int64_t r) {
#ifdef STELLA_SHUFFLE
  return (r == 4 || r == 8) && kWidest % r == 0;
#else
  return r < 0;  // never
#endif
}

bool rows_are_short(const MatrixView& view) { return rows_are_contiguous(view) && is_short_row(view.r); }

STELLA_INLINE float* rows_of(const MatrixView& view, int64_t i) {
  return static_cast<float*>(view.data) + i * view.row_stride;
}

// Rows of a chunk: half a dozen of them fit in L1.
STELLA_INLINE int64_t chunk_of_rows(int64_t r) { return r < 16 ? 512 / r : 32; }

template <int lanes_, int vectors_>
struct RowTile {
  static constexpr int lanes = lanes_, vectors = vectors_, width = lanes_ * vectors_;
};

template <int width, typename Body>
STELLA_INLINE void for_narrower_tiles(int64_t j, int64_t r, Body& body) {
  if constexpr (width >= kNarrowest) {
    if (j + width <= r) {
      body(j, RowTile<width, 1>());
      j += width;
    }
    for_narrower_tiles<width / 2>(j, r, body);
  }
}

// body(first column, RowTile) for all tiles of r columns, from the left.
template <typename Body>
STELLA_INLINE void for_row_tiles(int64_t r, Body&& body) {
  int64_t j = 0;
  for (; j + 2 * kWidest <= r; j += 2 * kWidest) body(j, RowTile<kWidest, 2>());
  for_narrower_tiles<kWidest>(j, r, body);
}

bool is_one_row_tile(int64_t r) { return r <= 2 * kWidest && (r & (r - 1)) == 0; }

// ---- Gram blocks ----------------------------------------------------------------------------------------------------

// sums[i, j] += a_i . b_j for `count` columns of a and a tile of columns of b.
template <int count, typename Tile>
void cross_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, float* sums,
                int64_t order) {
  using V = typename VectorOf<float, Tile::lanes>::type;
  constexpr int vectors = Tile::vectors;
  V accumulator[count][vectors] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < rows; ++k, a += a_stride, b += b_stride) {
    V right[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) right[v] = load<V>(b + v * Tile::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) accumulator[i][v] += right[v] * a[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      // Their own sum first: round-offs of terms of one sign add up where the terms are alike.
      float* sum = sums + i * order + v * Tile::lanes;
      store(sum, load<V>(sum) + accumulator[i][v]);
    }
}

// sums[i, j...] += a_i . b_j... for columns i of a in [first, last) and a tile of columns of b from j on.
template <typename Tile>
STELLA_INLINE void cross_column(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                int64_t first, int64_t last, int64_t j, float* sums, int64_t order) {
  for (int64_t k = 0; k < rows; k += kFloatSumTerms) {
    const int64_t some = rows - k < kFloatSumTerms ? rows - k : kFloatSumTerms;
    const float *from = a + k * a_stride, *right = b + k * b_stride + j;
    int64_t i = first;
    if constexpr (Tile::vectors == 1)
      for (; i + 8 <= last; i += 8)
        cross_tile<8, Tile>(from + i, a_stride, right, b_stride, some, sums + i * order + j, order);
    for (; i < last; i += 4)
      cross_tile<4, Tile>(from + i, a_stride, right, b_stride, some, sums + i * order + j, order);
  }
}

// sums (r x r, `order` apart) += a^T b over some rows; with `upper`, at least its upper triangle.
void cross_of_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t r,
                   bool upper, float* sums, int64_t order) {
  for_row_tiles(r, [&](int64_t j, auto tile) {
    using Tile = decltype(tile);
    const int64_t last = upper ? j + Tile::lanes : r;
    cross_column<Tile>(a, a_stride, b, b_stride, rows, 0, last, j, sums, order);
    if constexpr (Tile::vectors == 2)  // left of the diagonal lies the first of the two vectors
      if (upper)
        cross_column<RowTile<Tile::lanes, 1>>(a, a_stride, b, b_stride, rows, last, last + Tile::lanes, last, sums,
                                              order);
  });
}

// Float32 sums of Gram blocks (order x order) on their way to float64 ones.
class RowSums {
 public:
  RowSums(int64_t order, double* gram) : order_(order), gram_(gram) {
    sums_ = scratch().output.reserve<float>(order * order);
    for (int64_t i = 0; i < order * order; ++i) sums_[i] = 0.0f;
  }

  float* block(int64_t i, int64_t j) const { return sums_ + i * order_ + j; }
  int64_t order() const { return order_; }

  // To be told of the rows that went into every block; the last time with `last`.
  void added(int64_t rows, bool last) {
    rows_ += rows;
    if (rows_ < kFloatSumRows && !last) return;
    for (int64_t i = 0; i < order_ * order_; ++i) {
      gram_[i] += static_cast<double>(sums_[i]);
      sums_[i] = 0.0f;
    }
    rows_ = 0;
  }

 private:
  int64_t order_, rows_ = 0;
  double* gram_;
  float* sums_;
};

// ---- Updates --------------------------------------------------------------------------------------------------------

// Stores past the cache, which spares reading the line first; `to` is aligned to the vector.
template <typename V>
STELLA_INLINE void stream(float* to, V v) {
  if constexpr (kSanitized) {
    *reinterpret_cast<V*>(to) = v;
    return;
  }
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return _mm512_stream_ps(to, reinterpret_cast<__m512>(v));
#endif
#ifdef __AVX__
  if constexpr (sizeof(V) == 32) return _mm256_stream_ps(to, reinterpret_cast<__m256>(v));
#endif
#ifdef __SSE2__
  if constexpr (sizeof(V) == 16) return _mm_stream_ps(to, reinterpret_cast<__m128>(v));
#endif
  store(to, v);
}

STELLA_INLINE void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();  // before other threads are told that the rows are there
#endif
}

// Every row from `begin` on starts where the widest of its tiles' vectors may, and the tiles grow no wider along it; or
// short rows are whole vectors from there on.
bool can_stream(const MatrixView& out, int64_t begin) {
  const bool are_short = rows_are_short(out);
  int64_t lanes = kWidest;
  while (lanes > out.r && !are_short) lanes /= 2;
  return reinterpret_cast<uintptr_t>(rows_of(out, begin)) % (lanes * sizeof(float)) == 0 &&
         (are_short || out.row_stride % lanes == 0);
}

// One term of an update: rows times coefficients (r x r, blocked).
struct RowTerm {
  const float* rows;
  int64_t stride;
  const float* coefficients;
};

// (r x r) row-major float64 coefficients in float32, a tile of columns after the other.
float* block_row_coefficients(const double* from, int64_t r, float* to) {
  for_row_tiles(r, [&](int64_t j, auto tile) {
    for (int64_t k = 0; k < r; ++k)
      for (int64_t c = 0; c < tile.width; ++c) *to++ = static_cast<float>(from[k * r + j + c]);
  });
  return to;
}

// `rows` rows of a tile, from column j on, of to = finish(base + sum of the terms, row, column); base may be nullptr.
template <int rows, typename Tile, int fixed_r, bool streamed, typename Finish>
STELLA_INLINE void update_tile(const float* base, int64_t base_stride, const RowTerm* terms, int count, int64_t any_r,
                               int64_t j, int64_t i, float* to, int64_t to_stride, const Finish& finish) {
  using V = typename VectorOf<float, Tile::lanes>::type;
  constexpr int vectors = Tile::vectors;
  const int64_t r = fixed_r ? fixed_r : any_r;
  V sums[rows][vectors] = {};
  if (base) {
#pragma GCC unroll 8
    for (int a = 0; a < rows; ++a)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[a][v] = load<V>(base + (i + a) * base_stride + j + v * Tile::lanes);
  }
  for (int t = 0; t < count; ++t) {
    const float* from = terms[t].rows + i * terms[t].stride;
    const float* coefficients = terms[t].coefficients + j * r;
    const int64_t stride = terms[t].stride;
#pragma GCC unroll 8
    for (int64_t k = 0; k < r; ++k) {
      V c[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) c[v] = load<V>(coefficients + (k * vectors + v) * Tile::lanes);
#pragma GCC unroll 8
      for (int a = 0; a < rows; ++a) {
        const float value = from[a * stride + k];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[a][v] += c[v] * value;
      }
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < rows; ++a)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* at = to + (i + a) * to_stride + j + v * Tile::lanes;
      const V values = finish(sums[a][v], i + a, j + v * Tile::lanes);
      if constexpr (streamed)
        stream(at, values);
      else
        store(at, values);
    }
}

template <typename Tile, int fixed_r, bool streamed, typename Finish>
STELLA_INLINE void update_columns(const float* base, int64_t base_stride, const RowTerm* terms, int count, int64_t r,
                                  int64_t j, int64_t rows, float* to, int64_t to_stride, const Finish& finish) {
  constexpr int kTogether = Tile::vectors == 1 ? 8 : 6;
  int64_t i = 0;
  for (; i + kTogether <= rows; i += kTogether)
    update_tile<kTogether, Tile, fixed_r, streamed>(base, base_stride, terms, count, r, j, i, to, to_stride, finish);
  for (; i + 2 <= rows; i += 2)
    update_tile<2, Tile, fixed_r, streamed>(base, base_stride, terms, count, r, j, i, to, to_stride, finish);
  if (i < rows)
    update_tile<1, Tile, fixed_r, streamed>(base, base_stride, terms, count, r, j, i, to, to_stride, finish);
}

// to = base + sum of the terms, a few rows. `to` may be the base; it may be a term's rows where r is one tile.
template <bool streamed, typename Finish = AsTheyAre>
void update_rows(const float* base, int64_t base_stride, const RowTerm* terms, int count, int64_t r, int64_t rows,
                 float* to, int64_t to_stride, const Finish& finish = Finish()) {
  for_row_tiles(r, [&](int64_t j, auto tile) {
    using Tile = decltype(tile);
    if (r == Tile::width)  // known to the compiler
      update_columns<Tile, Tile::width, streamed>(base, base_stride, terms, count, r, j, rows, to, to_stride, finish);
    else
      update_columns<Tile, 0, streamed>(base, base_stride, terms, count, r, j, rows, to, to_stride, finish);
  });
}

STELLA_INLINE void prefetch_rows(const float* at, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(at + i, 0, 2);
}

}  // namespace
}  // namespace stella::STELLA_ISA

// The two passes over an (n, r) matrix: Gram blocks, then, after an r x r solve in float64, the update.
// Rows go through in chunks whose columns are packed side by side (panel.h); a matrix whose panels fit in the cache is
// packed once.
#pragma once

#include <type_traits>

#include "common/inverse_square_root.h"
#include "common/kernels.h"
#include "common/panel.h"
#include "stiefel/residual.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int64_t kKeptBytes = 320 << 10;  // all panels stay packed between the passes when they fit in most of an L2

int64_t chunk_rows_for(int64_t order, int64_t n, int element_bytes) {
  int64_t rows = order <= 64 ? 768 : order <= 128 ? 384 : 192;
  if (element_bytes == 8) rows /= 2;
  const int64_t step = kCombineVectors * (STELLA_VECTOR_BYTES / element_bytes);
  rows = round_up(rows, step);
  return n < rows ? round_up(n, STELLA_VECTOR_BYTES / element_bytes) : rows;
}

// An odd number of cache lines, so that the columns of a panel fall into all sets of the cache in turn.
int64_t column_stride(int64_t rows, int element_bytes) {
  const int64_t line = 64 / element_bytes;
  return ((rows + line - 1) / line | 1) * line;
}

// Calls body with a zero of the arithmetic type: float64 for float64 storage, float32 for the others.
template <typename Body>
void with_arithmetic(const MatrixView& view, Body&& body) {
  if (view.storage == Storage::float64)
    body(0.0);
  else
    body(0.0f);
}

// The panels of one or two operands of equal shape, packed chunk by chunk; the first operand's columns come first.
template <typename T>
struct Panels {
  const MatrixView* first;
  const MatrixView* second;  // may be nullptr
  bool difference;           // the second operand is packed as (second - first) * scale, else each times scale
  T scale;
  int64_t begin, end;

  int64_t order, padded_order, chunk, leading, panel_size;
  bool kept;
  bool packed = false;  // every panel is in the storage
  T* storage;

  Panels(const MatrixView* a, const MatrixView* b, bool is_difference, T scale_by, int64_t from, int64_t to)
      : first(a), second(b), difference(is_difference), scale(scale_by), begin(from), end(to) {
    order = b ? 2 * a->r : a->r;
    // Kernels read the second operand's columns in fours as well: room for those past its last.
    padded_order = round_up(order + (b ? kGramColumns - 1 : 0), kGramColumns);
    chunk = chunk_rows_for(order, to - from, sizeof(T));
    leading = column_stride(chunk, sizeof(T));
    panel_size = padded_order * leading;
    const int64_t chunks = (to - from + chunk - 1) / chunk;
    kept = chunks * panel_size * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
    storage = scratch().panel.reserve<T>((kept ? chunks : 1) * panel_size);
  }

  int64_t rows(int64_t i) const { return end - i < chunk ? end - i : chunk; }
  int64_t last() const { return begin + (end - begin - 1) / chunk * chunk; }
  int64_t padded(int64_t i) const { return round_up(rows(i), kLanes<T>); }

  // Where the panel of the chunk that starts at row i lies.
  T* slot(int64_t i) const { return storage + (kept ? (i - begin) / chunk * panel_size : 0); }

  // That panel; packed anew unless an earlier pass left it.
  T* at(int64_t i) const {
    T* panel = slot(i);
    if (packed) return panel;
    const int64_t r = first->r, count = rows(i), full = padded(i);
    pack(*first, i, count, full, panel, leading, difference ? T(1) : scale);
    if (second) {
      T* other = panel + r * leading;
      pack(*second, i, count, full, other, leading, difference ? T(1) : scale);
      if (difference)
        for (int64_t j = 0; j < r * leading; j += leading)
          for (int64_t k = 0; k < full; ++k) other[j + k] = (other[j + k] - panel[j + k]) * scale;
    }
    for (int64_t j = order * leading; j < panel_size; j += leading)
      for (int64_t k = 0; k < full; ++k) panel[j + k] = T(0);
    return panel;
  }
};

// Upper triangle of the Gram matrix of all packed columns, added to `gram` (order x order).
template <typename T>
void gram_pass(Panels<T>& panels, double* gram) {
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    gram_block(panel, panels.leading, panels.order, panel, panels.leading, panels.order, panels.padded(i), gram,
               panels.order, true);
  }
  panels.packed = panels.kept;
}

// body(result, first row) for each chunk of base + (packed columns from `skip` on) * coefficients (with r columns); the
// base is the first operand or nothing.
template <typename T, typename Body>
void for_updated_chunks(const Panels<T>& panels, const double* coefficients, int64_t skip, bool first_is_base,
                        const Body& body) {
  const int64_t r = panels.first->r, out_rows = round_up(r, kCombineColumns), terms = panels.order - skip;
  Scratch& s = scratch();
  T* blocked = s.coefficients.reserve<T>(terms * out_rows);
  block_coefficients(coefficients, r, terms, r, blocked);
  T* result = s.output.reserve<T>(out_rows * panels.leading);
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    // The base's columns are padded to four by the panel's rows that follow them; what lands there is never read.
    combine(panel + skip * panels.leading, terms, panels.leading, blocked, r, first_is_base ? panel : nullptr, result,
            panels.leading, panels.padded(i));
    body(result, i);
  }
}

// The same, to `out`. With `gram`, adds the Gram matrix of what was written, before it was stored.
template <typename T>
void update_pass(const Panels<T>& panels, const double* coefficients, int64_t skip, bool first_is_base,
                 const MatrixView& out, double* gram) {
  const int64_t r = out.r;
  for_updated_chunks(panels, coefficients, skip, first_is_base, [&](const T* result, int64_t i) {
    if (gram) gram_block(result, panels.leading, r, result, panels.leading, r, panels.padded(i), gram, r, true);
    unpack(result, panels.leading, out, i, panels.rows(i));
  });
}

// Full symmetric square with padded leading dimension from the upper triangle of rows and columns [at, at + r).
void symmetric_from_upper(const double* upper, int64_t order, int64_t at, int64_t r, double* full) {
  const int64_t leading = square_leading(r);
  for (int64_t i = 0; i < square_size(r); ++i) full[i] = 0.0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i; j < r; ++j) {
      const double value = upper[(at + i) * order + at + j];
      full[i * leading + j] = value;
      full[j * leading + i] = value;
    }
}

template <typename T>
double solve_tolerance() {
  return std::is_same_v<T, float> ? 1e-9 : 1e-15;
}

// `count` squares of this order.
double* zeroed_blocks(int64_t count, int64_t order) {
  double* gram = scratch().gram.reserve<double>(count * order * order);
  for (int64_t i = 0; i < count * order * order; ++i) gram[i] = 0.0;
  return gram;
}

double* zeroed_gram(int64_t order) { return zeroed_blocks(1, order); }

}  // namespace
}  // namespace stella::STELLA_ISA

// Project-and-retract straight from the rows, where every row of both factors is whole float32 vectors without gaps.
// The step is formed anew in each pass, a few rows at a time.
#pragma once

#include "stiefel/row_kernels.h"

namespace stella::STELLA_ISA {
namespace {

bool retract_by_rows(const RetractJob& job) {
  return rows_are_contiguous(job.moved) && rows_are_contiguous(job.previous);
}

// step = (moved - previous) * scale for a whole number of vectors of four.
STELLA_INLINE void step_of(const float* moved, const float* previous, float scale, int64_t count,
                           float* __restrict step) {
  for (int64_t i = 0; i < count; ++i) step[i] = (moved[i] - previous[i]) * scale;
}

// Adds the Gram matrix of [Y, step] over rows [begin, end) to `gram` (2r x 2r).
void retract_gram_of_rows(const RetractJob& job, int64_t begin, int64_t end, double* gram) {
  const int64_t r = job.moved.r, chunk = chunk_of_rows(r);
  const float scale = static_cast<float>(1.0 / job.divisor);
  float* step = scratch().tall.reserve<float>(chunk * r);
  RowSums sums(2 * r, gram);
  for (int64_t i = begin; i < end; i += chunk) {
    const int64_t rows = end - i < chunk ? end - i : chunk;
    const float* Y = rows_of(job.previous, i);
    step_of(rows_of(job.moved, i), Y, scale, rows * r, step);
    cross_of_rows(Y, r, Y, r, rows, r, true, sums.block(0, 0), 2 * r);
    cross_of_rows(Y, r, step, r, rows, r, false, sums.block(0, r), 2 * r);
    cross_of_rows(step, r, step, r, rows, r, true, sums.block(r, r), 2 * r);
    sums.added(rows, i + chunk >= end);
  }
}

// moved <- Y + Y (B R - I) + step R; `coefficients` (2r x r) holds B R - I and R.
void retract_update_of_rows(const RetractJob& job, int64_t begin, int64_t end, const double* coefficients) {
  constexpr int64_t kChunk = 24;
  const int64_t r = job.moved.r;
  const float scale = static_cast<float>(1.0 / job.divisor);
  float* first = scratch().coefficients.reserve<float>(2 * r * r);
  float* second = block_row_coefficients(coefficients, r, first);
  block_row_coefficients(coefficients + r * r, r, second);
  float* step = scratch().tall.reserve<float>(kChunk * r);
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t rows = end - i < kChunk ? end - i : kChunk;
    const float* Y = rows_of(job.previous, i);
    float* moved = rows_of(job.moved, i);
    step_of(moved, Y, scale, rows * r, step);
    const RowTerm terms[2] = {{Y, r, first}, {step, r, second}};
    update_rows<false>(Y, r, terms, 2, r, rows, moved, r);
  }
}

}  // namespace
}  // namespace stella::STELLA_ISA

// The Riemannian AdamW step straight from the rows, where every row is whole float32 vectors without gaps. Passes go
// over the factor in turn forwards and backwards: what the one left in the cache the next one begins with.
#pragma once

#include "adamw_moments.h"
#include "row_kernels.h"
#include "upcoming.h"

namespace stella::STELLA_ISA {
namespace {

bool adamw_by_rows(const AdamwJob& job) {
  return rows_are_contiguous(job.factor) && rows_are_contiguous(job.gradient) &&
         rows_are_contiguous(job.first_moment) && rows_are_contiguous(job.second_moment);
}

// Y^T gradient, added to `coupling` (r x r).
void coupling_of_rows(const AdamwJob& job, int64_t begin, int64_t end, double* coupling) {
  const int64_t r = job.factor.r, chunk = chunk_of_rows(r);
  RowSums sums(r, coupling);
  for (int64_t i = begin; i < end; i += chunk) {
    const int64_t rows = end - i < chunk ? end - i : chunk;
    cross_of_rows(rows_of(job.factor, i), r, rows_of(job.gradient, i), r, rows, r, false, sums.block(0, 0), r);
    sums.added(rows, i + chunk >= end);
  }
}

// Riemannian gradient and moments; the steps go to `steps`, rows like the factor's, and the Gram of [Y, step] is added
// to `gram` (2r x 2r). `negative` holds -(gradient^T Y), r x r.
void step_of_rows(const AdamwJob& job, int64_t begin, int64_t end, const double* negative, float* steps, double* gram) {
  const Moments<float> moments(job);
  const int64_t r = job.factor.r, chunk = chunk_of_rows(r);
  float* blocked = scratch().coefficients.reserve<float>(r * r);
  block_row_coefficients(negative, r, blocked);
  RowSums sums(2 * r, gram);
  for (int64_t i = begin + (end - begin - 1) / chunk * chunk; i >= begin; i -= chunk) {
    const int64_t rows = end - i < chunk ? end - i : chunk;
    const float* Y = rows_of(job.factor, i);
    float* step = steps + i * r;
    float *first = rows_of(job.first_moment, i), *second = rows_of(job.second_moment, i);
    const RowTerm term = {Y, r, blocked};
    update_rows<false>(rows_of(job.gradient, i), r, &term, 1, r, rows, step, r);
    moments.advance(step, first, second, rows * r);
    // The next chunk's moments come from memory while the Gram blocks compute, as many lines at a time as can be asked
    // for.
    const int64_t ahead = i > begin ? chunk * r : 0;
    prefetch_rows(first - ahead, ahead);
    cross_of_rows(Y, r, Y, r, rows, r, true, sums.block(0, 0), 2 * r);
    prefetch_rows(second - ahead, ahead / 2);
    cross_of_rows(Y, r, step, r, rows, r, false, sums.block(0, r), 2 * r);
    prefetch_rows(second - ahead / 2, ahead / 2);
    cross_of_rows(step, r, step, r, rows, r, true, sums.block(r, r), 2 * r);
    sums.added(rows, i == begin);
  }
}

// Y <- Y + Y (B R - I) + step R; `coefficients` (2r x r) holds B R - I and R.
void retract_rows(const AdamwJob& job, int64_t begin, int64_t end, const float* steps, const double* coefficients) {
  const int64_t r = job.factor.r, chunk = 24;
  float* blocked = scratch().coefficients.reserve<float>(2 * r * r + chunk * r);
  float* second = block_row_coefficients(coefficients, r, blocked);
  float* copy = block_row_coefficients(coefficients + r * r, r, second);
  Upcoming upcoming(job);
  for (int64_t i = begin; i < end; i += chunk) {
    const int64_t rows = end - i < chunk ? end - i : chunk;
    float* Y = rows_of(job.factor, i);
    upcoming.fetch(rows * r * static_cast<int64_t>(sizeof(float)));
    const float* old = Y;
    if (!is_one_row_tile(r)) {  // columns are written before the others are read
      std::memcpy(copy, Y, static_cast<size_t>(rows * r) * sizeof(float));
      old = copy;
    }
    const RowTerm terms[2] = {{old, r, blocked}, {steps + i * r, r, second}};
    update_rows<false>(old, r, terms, 2, r, rows, Y, r);
  }
}

}  // namespace
}  // namespace stella::STELLA_ISA

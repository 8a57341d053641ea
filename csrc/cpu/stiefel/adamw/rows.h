// The Riemannian AdamW step straight from the rows, where every row is whole float32 vectors without gaps. Passes go
// over the factor in turn forwards and backwards: what the one left in the cache the next one begins with.
#pragma once

#include "common/upcoming.h"
#include "stiefel/adamw/moments.h"
#include "stiefel/row_kernels.h"

namespace stella::STELLA_ISA {
namespace {

bool adamw_by_rows(const AdamwJob& job) {
  return rows_are_contiguous(job.factor) && rows_are_contiguous(job.gradient) &&
         rows_are_contiguous(job.first_moment) && rows_are_contiguous(job.second_moment);
}

class RowPasses {
 public:
  using Value = float;

  RowPasses(const AdamwJob& job, int64_t begin, int64_t end)
      : job_(job), begin_(begin), end_(end), r_(job.factor.r), chunk_(chunk_of_rows(job.factor.r)) {}

  bool steps_in_panels() const { return false; }
  void keep_steps(float*) const {}

  // Y^T gradient, added to `coupling` (r x r).
  void coupling(double* coupling) const {
    RowSums sums(r_, coupling);
    for (int64_t i = begin_; i < end_; i += chunk_) {
      const int64_t rows = rows_from(i);
      cross_of_rows(rows_of(job_.factor, i), r_, rows_of(job_.gradient, i), r_, rows, r_, false, sums.block(0, 0), r_);
      sums.added(rows, i + chunk_ >= end_);
    }
  }

  // Riemannian gradient and moments; the steps go to `steps`, rows like the factor's, and the Gram of [Y, step] is
  // added to `gram` (2r x 2r). `negative` holds -(gradient^T Y), r x r.
  void step(const double* negative, float* steps, double* gram) const {
    const Moments<float> moments(job_);
    const int64_t order = 2 * r_;
    float* blocked = scratch().coefficients.reserve<float>(r_ * r_);
    block_row_coefficients(negative, r_, blocked);
    RowSums sums(order, gram);
    for (int64_t i = begin_ + (end_ - begin_ - 1) / chunk_ * chunk_; i >= begin_; i -= chunk_) {
      const int64_t rows = rows_from(i);
      const float* Y = rows_of(job_.factor, i);
      float* step = steps + i * r_;
      float *first = rows_of(job_.first_moment, i), *second = rows_of(job_.second_moment, i);
      const RowTerm term = {Y, r_, blocked};
      // Roots and quotients are made of the products' own registers: their unit works beside that of the products.
      const auto advance = [&](auto values, int64_t row, int64_t column) {
        return moments.advance(values, first + row * r_ + column, second + row * r_ + column);
      };
      update_rows<false>(rows_of(job_.gradient, i), r_, &term, 1, r_, rows, step, r_, advance);
      // The next chunk's moments come from memory while the Gram blocks compute, as many lines at a time as can be
      // asked for.
      const int64_t ahead = i > begin_ ? chunk_ * r_ : 0;
      prefetch_rows(first - ahead, ahead);
      cross_of_rows(Y, r_, Y, r_, rows, r_, true, sums.block(0, 0), order);
      prefetch_rows(second - ahead, ahead / 2);
      cross_of_rows(Y, r_, step, r_, rows, r_, false, sums.block(0, r_), order);
      prefetch_rows(second - ahead / 2, ahead / 2);
      cross_of_rows(step, r_, step, r_, rows, r_, true, sums.block(r_, r_), order);
      sums.added(rows, i == begin_);
    }
  }

  // Y <- Y + Y (B R - I) + step R; `coefficients` (2r x r) holds B R - I and R.
  void update(const float* steps, const double* coefficients) const {
    constexpr int64_t kChunk = 24;
    float* blocked = scratch().coefficients.reserve<float>(2 * r_ * r_ + kChunk * r_);
    float* second = block_row_coefficients(coefficients, r_, blocked);
    float* copy = block_row_coefficients(coefficients + r_ * r_, r_, second);
    Upcoming upcoming(job_);
    for (int64_t i = begin_; i < end_; i += kChunk) {
      const int64_t rows = end_ - i < kChunk ? end_ - i : kChunk;
      float* Y = rows_of(job_.factor, i);
      upcoming.fetch(rows * r_ * static_cast<int64_t>(sizeof(float)));
      const float* old = Y;
      if (!is_one_row_tile(r_)) {  // columns are written before the others are read
        std::memcpy(copy, Y, static_cast<size_t>(rows * r_) * sizeof(float));
        old = copy;
      }
      const RowTerm terms[2] = {{old, r_, blocked}, {steps + i * r_, r_, second}};
      update_rows<false>(old, r_, terms, 2, r_, rows, Y, r_);
    }
  }

 private:
  int64_t rows_from(int64_t i) const { return end_ - i < chunk_ ? end_ - i : chunk_; }

  const AdamwJob& job_;
  int64_t begin_, end_, r_, chunk_;
};

}  // namespace
}  // namespace stella::STELLA_ISA

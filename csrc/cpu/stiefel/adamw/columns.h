// The Riemannian AdamW step where the columns of all four matrices are contiguous, as those of a factor stored (r, n)
// are: only the factor is packed, the rest is read and written where it is.
#pragma once

#include "common/upcoming.h"
#include "stiefel/adamw/moments.h"
#include "stiefel/adamw/steps.h"

namespace stella::STELLA_ISA {
namespace {

template <typename T>
bool adamw_by_columns(const AdamwJob& job) {
  const auto columns = [](const MatrixView& m) {
    return m.row_stride == 1 && m.storage == (std::is_same_v<T, float> ? Storage::float32 : Storage::float64);
  };
  // Columns go by fours, and there is none to read past the last.
  return job.factor.r % kCombineColumns == 0 && kGramColumns == kCombineColumns && columns(job.factor) &&
         columns(job.gradient) && columns(job.first_moment) && columns(job.second_moment);
}

template <typename T>
class ColumnPasses {
 public:
  using Value = T;

  ColumnPasses(const AdamwJob& job, int64_t begin, int64_t end)
      : job_(job), layout_(job, sizeof(T), false), begin_(begin), end_(end), r_(job.factor.r) {
    const int64_t chunks = (end - begin + layout_.chunk - 1) / layout_.chunk;
    kept_ = chunks * r_ * layout_.leading * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
    panels_ = scratch().panel.reserve<T>((kept_ ? chunks : 1) * r_ * layout_.leading);
  }

  bool steps_in_panels() const { return false; }
  void keep_steps(T*) const {}

  // Y^T gradient, added to `coupling` (r x r).
  void coupling(double* coupling) {
    for (int64_t i = begin_; i < end_; i += layout_.chunk) {
      const T* Y = packed(i);
      const int64_t rows = rows_from(i), whole = whole_vectors(rows), leading = layout_.leading;
      gram_block(Y, leading, r_, column_at(job_.gradient, i), job_.gradient.col_stride, r_, whole, coupling, r_, false);
      fetch(i + layout_.chunk);
      if (whole == rows) continue;
      T* rest = scratch().tall.reserve<T>(r_ * kLanes<T>);
      pack(job_.gradient, i + whole, rows - whole, kLanes<T>, rest, kLanes<T>, T(1));
      gram_block(Y + whole, leading, r_, rest, kLanes<T>, r_, kLanes<T>, coupling, r_, false);
    }
    packed_ = kept_;
  }

  // Riemannian gradient and moments; the steps go to `steps`; the Gram of [Y, step] is added to `gram` (2r x 2r).
  // `negative` holds -(gradient^T Y), r x r.
  void step(const double* negative, T* steps, double* gram) {
    const Moments<T> moments(job_);
    const int64_t leading = layout_.leading, order = 2 * r_;
    const int64_t first_stride = job_.first_moment.col_stride, second_stride = job_.second_moment.col_stride;
    T* blocked = scratch().coefficients.reserve<T>(r_ * r_);
    block_coefficients(negative, r_, r_, r_, blocked);
    for (int64_t i = begin_; i < end_; i += layout_.chunk) {
      const T* Y = packed(i);
      const int64_t rows = rows_from(i), whole = whole_vectors(rows), padded = round_up(rows, kLanes<T>);
      T *step = steps + layout_.chunk_at(i), *first = column_at(job_.first_moment, i);
      T *second = column_at(job_.second_moment, i), *gradient = column_at(job_.gradient, i);
      // Roots and quotients are made of the products' own registers: their unit works beside that of the products.
      const auto advance = [&](auto values, int64_t row, int64_t j) {
        T *m = first + j * first_stride + row, *v = second + j * second_stride + row;
        __builtin_prefetch(m + kPart, 0, 2);
        __builtin_prefetch(v + kPart, 0, 2);
        return moments.advance(values, m, v);
      };
      combine<T>({Y, r_, leading}, {nullptr, 0, 0}, blocked, r_, gradient, job_.gradient.col_stride, step, leading,
                 whole, advance);
      if (whole < rows) {
        T* rest = scratch().tall.reserve<T>(r_ * kLanes<T>);
        pack(job_.gradient, i + whole, rows - whole, kLanes<T>, rest, kLanes<T>, T(1));
        combine<T>({Y + whole, r_, leading}, {nullptr, 0, 0}, blocked, r_, rest, kLanes<T>, step + whole, leading,
                   kLanes<T>);
        for (int64_t j = 0; j < r_; ++j) {
          T* values = step + j * leading;
          moments.advance(values + whole, first + j * first_stride + whole, second + j * second_stride + whole,
                          rows - whole);
          for (int64_t k = rows; k < padded; ++k) values[k] = T(0);
        }
      }
      gram_block(Y, leading, r_, Y, leading, r_, padded, gram, order, true);
      gram_block(Y, leading, r_, step, leading, r_, padded, gram + r_, order, false);
      gram_block(step, leading, r_, step, leading, r_, padded, gram + r_ * order + r_, order, true);
    }
    packed_ = kept_;
  }

  // Y <- Y + Y (B R - I) + step R; `coefficients` (2r x r) holds B R - I and R.
  void update(const T* steps, const double* coefficients) const {
    T* blocked = scratch().coefficients.reserve<T>(2 * r_ * r_);
    block_coefficients(coefficients, r_, 2 * r_, r_, blocked);
    const int64_t part_leading = column_stride(kPart, sizeof(T));
    T* part = scratch().output.reserve<T>(r_ * part_leading);
    Upcoming upcoming(job_);
    for (int64_t i = begin_; i < end_; i += layout_.chunk) {
      const int64_t rows = rows_from(i);
      const T* step = steps + layout_.chunk_at(i);
      for (int64_t k = 0; k < rows; k += kPart) {
        const int64_t some = rows - k < kPart ? rows - k : kPart, whole = whole_vectors(some);
        const T* Y = packed_ ? slot(i) + k : part;
        const int64_t leading = packed_ ? layout_.leading : part_leading;
        if (!packed_) pack(job_.factor, i + k, some, round_up(some, kLanes<T>), part, part_leading, T(1));
        upcoming.fetch(kPart * r_ * static_cast<int64_t>(sizeof(T)));
        combine<T>({Y, r_, leading}, {step + k, r_, layout_.leading}, blocked, r_, Y, leading,
                   column_at(job_.factor, i + k), job_.factor.col_stride, whole);
        if (whole == some) continue;
        T* rest = scratch().tall.reserve<T>(r_ * kLanes<T>);
        combine<T>({Y + whole, r_, leading}, {step + k + whole, r_, layout_.leading}, blocked, r_, Y + whole, leading,
                   rest, kLanes<T>, kLanes<T>);
        unpack(rest, kLanes<T>, job_.factor, i + k + whole, some - whole);
      }
    }
  }

 private:
  static constexpr int64_t kPart = kCombineVectors * kLanes<T>;  // rows of a register tile

  int64_t rows_from(int64_t i) const { return end_ - i < layout_.chunk ? end_ - i : layout_.chunk; }
  static int64_t whole_vectors(int64_t rows) { return rows / kLanes<T> * kLanes<T>; }
  static T* column_at(const MatrixView& m, int64_t i) { return static_cast<T*>(m.data) + i; }

  // Asks for the factor and the gradient of a chunk: to the hardware's prefetcher its columns are many short streams.
  void fetch(int64_t i) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t j = 0; i < end_ && j < r_; ++j) {
      const T* gradient = column_at(job_.gradient, i) + j * job_.gradient.col_stride;
      const T* factor = column_at(job_.factor, i) + j * job_.factor.col_stride;
      for (int64_t k = 0; k < rows_from(i); k += line) {
        __builtin_prefetch(gradient + k, 0, 2);
        __builtin_prefetch(factor + k, 0, 2);
      }
    }
  }

  T* slot(int64_t i) const { return panels_ + (kept_ ? (i - begin_) / layout_.chunk * r_ * layout_.leading : 0); }

  // The factor's columns of the chunk that starts at row i; packed anew unless an earlier pass left them.
  const T* packed(int64_t i) const {
    T* panel = slot(i);
    const int64_t rows = rows_from(i);
    if (!packed_) pack(job_.factor, i, rows, round_up(rows, kLanes<T>), panel, layout_.leading, T(1));
    return panel;
  }

  const AdamwJob& job_;
  StepsLayout layout_;
  int64_t begin_, end_, r_;
  bool kept_, packed_ = false;
  T* panels_;
};

}  // namespace
}  // namespace stella::STELLA_ISA

// The Riemannian AdamW step of any factor, through packed panels (panel.h).
#pragma once

#include "common/upcoming.h"
#include "stiefel/adamw/moments.h"
#include "stiefel/adamw/steps.h"
#include "stiefel/value_range.h"

namespace stella::STELLA_ISA {
namespace {

template <typename T>
class PanelPasses {
 public:
  using Value = T;

  PanelPasses(const AdamwJob& job, int64_t begin, int64_t end)
      : job_(job),
        layout_(job, sizeof(T), false),
        r_(job.factor.r),
        panels_(&job.factor, &job.gradient, false, 1, begin, end) {}

  // The steps replace the gradients in their panels where those are kept.
  bool steps_in_panels() const { return panels_.kept; }

  // Y^T gradient, added to `coupling` (r x r).
  void coupling(double* coupling) {
    for (int64_t i = panels_.begin; i < panels_.end; i += panels_.chunk) {
      const T* panel = panels_.at(i);
      gram_block(panel, panels_.leading, r_, panel + r_ * panels_.leading, panels_.leading, r_, panels_.padded(i),
                 coupling, r_, false);
    }
    panels_.packed = panels_.kept;
  }

  // Riemannian gradient and moments; the steps go to `steps`, or stay in the panels where that is nullptr; the Gram of
  // [Y, step] is added to `gram`. `negative` holds -(gradient^T Y), r x r.
  void step(const double* negative, T* steps, double* gram) {
    const int64_t leading = panels_.leading, out_rows = round_up(r_, kCombineColumns);
    T* blocked = scratch().coefficients.reserve<T>(r_ * out_rows);
    block_coefficients(negative, r_, r_, r_, blocked);
    // From the last chunk to the first: the cache still holds the end of what the pass before read.
    for (int64_t i = panels_.last(); i >= panels_.begin; i -= panels_.chunk) {
      T* panel = panels_.at(i);
      T* values = panel + r_ * leading;  // the gradient, then the step: columns past the last one are room for fours
      const int64_t rows = panels_.rows(i), padded = panels_.padded(i);
      combine(panel, r_, leading, blocked, r_, values, values, leading, padded);
      advance(i, rows, padded, values);
      for (int64_t j = 0; j < r_; ++j)
        for (int64_t k = rows; k < padded; ++k) values[j * leading + k] = T(0);
      if (steps) keep_chunk(i, steps);
      gram_block(panel, leading, panels_.order, panel, leading, panels_.order, padded, gram, panels_.order, true);
    }
    panels_.packed = panels_.kept;
  }

  // Whether steps and moments stay finite when they are stored: all is computed, and written nowhere.
  bool step_fits(const double* negative) {
    const int64_t leading = panels_.leading, out_rows = round_up(r_, kCombineColumns);
    const Moments<T> moments(job_);
    Buffer small, own;
    T* blocked = small.reserve<T>(r_ * out_rows);
    block_coefficients(negative, r_, r_, r_, blocked);
    T* values = own.reserve<T>((out_rows + 2 * r_) * leading);
    T *m = values + out_rows * leading, *v = m + r_ * leading;
    bool finite = true;
    for (int64_t i = panels_.begin; finite && i < panels_.end; i += panels_.chunk) {
      const T* panel = panels_.at(i);
      const int64_t rows = panels_.rows(i), padded = panels_.padded(i);
      combine(panel, r_, leading, blocked, r_, panel + r_ * leading, values, leading, padded);
      pack(job_.first_moment, i, rows, padded, m, leading, T(1));
      pack(job_.second_moment, i, rows, padded, v, leading, T(1));
      for (int64_t j = 0; j < r_; ++j) moments.advance(values + j * leading, m + j * leading, v + j * leading, rows);
      finite = fits(m, leading, rows, r_, job_.first_moment.storage) &&
               fits(v, leading, rows, r_, job_.second_moment.storage) &&
               fits(values, leading, rows, r_, std::is_same_v<T, float> ? Storage::float32 : Storage::float64);
    }
    return finite;
  }

  // ||Y^T Y - I||_F
  double drift() {
    double* gram = zeroed_gram(r_);
    for (int64_t i = panels_.begin; i < panels_.end; i += panels_.chunk) {
      const T* panel = panels_.at(i);
      gram_block(panel, panels_.leading, r_, panel, panels_.leading, r_, panels_.padded(i), gram, r_, true);
    }
    return root_of_sum(gram, r_, r_);
  }

  // All steps, from kept panels.
  void keep_steps(T* steps) const {
    for (int64_t i = panels_.begin; i < panels_.end; i += panels_.chunk) keep_chunk(i, steps);
  }

  // Y <- Y + Y (B R - I) + step R; `steps` is read where the panels were not kept.
  void update(const T* steps, const double* coefficients) const {
    const int64_t leading = panels_.leading, out_rows = round_up(r_, kCombineColumns);
    T* blocked = scratch().coefficients.reserve<T>(2 * r_ * out_rows);
    block_coefficients(coefficients, r_, 2 * r_, r_, blocked);
    T* result = scratch().output.reserve<T>(out_rows * leading);
    constexpr int64_t part = kCombineVectors * kLanes<T>;
    Upcoming upcoming(job_);
    for (int64_t i = panels_.begin; i < panels_.end; i += panels_.chunk) {
      const int64_t rows = panels_.rows(i), padded = panels_.padded(i);
      T* panel = panels_.slot(i);
      if (!panels_.packed) pack(job_.factor, i, rows, padded, panel, leading, T(1));
      const T* step = panels_.packed ? panel + r_ * leading : steps + layout_.chunk_at(i);
      const int64_t step_leading = panels_.packed ? leading : layout_.leading;
      for (int64_t k = 0; k < padded; k += part) {
        upcoming.fetch(part * r_ * static_cast<int64_t>(sizeof(T)));
        combine<T>({panel + k, r_, leading}, {step + k, r_, step_leading}, blocked, r_, panel + k, leading, result + k,
                   leading, padded - k < part ? padded - k : part);
      }
      unpack(result, leading, job_.factor, i, rows);
    }
  }

 private:
  // The steps of the chunk that starts at row i, from its panel to `steps`.
  void keep_chunk(int64_t i, T* steps) const {
    const T* values = panels_.slot(i) + r_ * panels_.leading;
    T* kept = steps + layout_.chunk_at(i);
    for (int64_t j = 0; j < r_; ++j)
      std::memcpy(kept + j * layout_.leading, values + j * panels_.leading,
                  static_cast<size_t>(panels_.padded(i)) * sizeof(T));
  }

  // Riemannian gradients in the columns of `panel` become steps.
  void advance(int64_t begin, int64_t rows, int64_t padded, T* panel) const {
    const Moments<T> moments(job_);
    const int64_t leading = panels_.leading;
    const MatrixView &first = job_.first_moment, &second = job_.second_moment;
    const bool columns = first.row_stride == 1 && second.row_stride == 1;
    const bool runs = first.col_stride == 1 && second.col_stride == 1;
    if (!columns && !runs) {  // strided both ways: through panels of their own
      Buffer own;
      T* m = own.reserve<T>(2 * r_ * leading);
      T* v = m + r_ * leading;
      pack(first, begin, rows, padded, m, leading, T(1));
      pack(second, begin, rows, padded, v, leading, T(1));
      for (int64_t j = 0; j < r_; ++j) moments.advance(panel + j * leading, m + j * leading, v + j * leading, rows);
      unpack(m, leading, first, begin, rows);
      unpack(v, leading, second, begin, rows);
      return;
    }
    with_storage(first, [&](auto* data) {
      using S = std::remove_pointer_t<decltype(data)>;
      S* m = data + begin * first.row_stride;
      S* v = static_cast<S*>(second.data) + begin * second.row_stride;
      if (columns) {
        for (int64_t j = 0; j < r_; ++j)
          moments.advance(panel + j * leading, m + j * first.col_stride, v + j * second.col_stride, rows);
        return;
      }
      T* values = scratch().tall.reserve<T>(rows * r_);  // the chunk in the moments' own order
      const MatrixView natural = {values, rows, r_,
                                  r_,     1,    std::is_same_v<T, float> ? Storage::float32 : Storage::float64};
      unpack(panel, leading, natural, 0, rows);
      if (first.row_stride == r_ && second.row_stride == r_) {
        moments.advance(values, m, v, rows * r_);
      } else {
        for (int64_t i = 0; i < rows; ++i)
          moments.advance(values + i * r_, m + i * first.row_stride, v + i * second.row_stride, r_);
      }
      pack(natural, 0, rows, padded, panel, leading, T(1));
    });
  }

  const AdamwJob& job_;
  StepsLayout layout_;
  int64_t r_;
  Panels<T> panels_;
};

}  // namespace
}  // namespace stella::STELLA_ISA

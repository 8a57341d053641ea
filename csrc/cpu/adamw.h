// The whole Riemannian AdamW step of one factor: Riemannian gradient, moments, gradient scaling, tangent projection,
// polar retraction. The factor is read twice (three times where gradient^T factor is not known), the gradient once
// (twice), the moments once; between the passes the steps are kept, one factor's worth.
#pragma once

#include "adamw_rows.h"
#include "passes.h"
#include "retract.h"

namespace stella::STELLA_ISA {
namespace {

// Where the steps of the chunk that starts at row i are kept: its columns side by side, `padded` rows each.
STELLA_INLINE int64_t steps_offset(int64_t i, int64_t r) { return i * r; }

int64_t adamw_steps_bytes(const AdamwJob& job) {
  const int64_t bytes = job.factor.storage == Storage::float64 ? 8 : 4;
  return (job.factor.n + STELLA_VECTOR_BYTES / bytes) * job.factor.r * bytes;  // the last chunk is padded to a vector
}

// Riemannian gradients in the columns of `panel` become steps.
template <typename T>
void advance_chunk(const AdamwJob& job, int64_t begin, int64_t rows, int64_t padded, T* panel, int64_t leading) {
  const Moments<T> moments(job);
  const MatrixView &first = job.first_moment, &second = job.second_moment;
  const int64_t r = first.r;
  const bool columns = first.row_stride == 1 && second.row_stride == 1;
  const bool runs = first.col_stride == 1 && second.col_stride == 1;
  if (!columns && !runs) {  // strided both ways: through panels of their own
    Buffer own;
    T* m = own.reserve<T>(2 * r * leading);
    T* v = m + r * leading;
    pack(first, begin, rows, padded, m, leading, T(1));
    pack(second, begin, rows, padded, v, leading, T(1));
    for (int64_t j = 0; j < r; ++j) moments.advance(panel + j * leading, m + j * leading, v + j * leading, rows);
    unpack(m, leading, first, begin, rows);
    unpack(v, leading, second, begin, rows);
    return;
  }
  with_storage(first, [&](auto* data) {
    using S = std::remove_pointer_t<decltype(data)>;
    S* m = data + begin * first.row_stride;
    S* v = static_cast<S*>(second.data) + begin * second.row_stride;
    if (columns) {
      for (int64_t j = 0; j < r; ++j)
        moments.advance(panel + j * leading, m + j * first.col_stride, v + j * second.col_stride, rows);
      return;
    }
    T* values = scratch().tall.reserve<T>(rows * r);  // the chunk in the moments' own order
    const MatrixView natural = {values, rows, r, r, 1, std::is_same_v<T, float> ? Storage::float32 : Storage::float64};
    unpack(panel, leading, natural, 0, rows);
    if (first.row_stride == r && second.row_stride == r) {
      moments.advance(values, m, v, rows * r);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        moments.advance(values + i * r, m + i * first.row_stride, v + i * second.row_stride, r);
    }
    pack(natural, 0, rows, padded, panel, leading, T(1));
  });
}

// Y^T gradient, added to `coupling` (r x r): the transpose of the K of the Riemannian gradient.
template <typename T>
void coupling_pass(const AdamwJob& job, Panels<T>& panels, double* coupling) {
  if (adamw_by_rows(job)) return coupling_of_rows(job, panels.begin, panels.end, coupling);
  const int64_t r = panels.first->r;
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    gram_block(panel, r, panel + r * panels.leading, r, panels.leading, panels.padded(i), coupling, r, false);
  }
  panels.packed = panels.kept;
}

// The steps of the chunk that starts at row i, from its panel to `steps`.
template <typename T>
void keep_steps(const Panels<T>& panels, int64_t i, T* steps) {
  const int64_t r = panels.first->r, padded = panels.padded(i);
  const T* values = panels.slot(i) + r * panels.leading;
  T* kept = steps + steps_offset(i, r);
  for (int64_t j = 0; j < r; ++j)
    std::memcpy(kept + j * padded, values + j * panels.leading, static_cast<size_t>(padded) * sizeof(T));
}

// Riemannian gradient and moments; the steps go to `steps`, or stay in the panels where that is nullptr; the Gram of
// [Y, step] is added to `gram`.
template <typename T>
void step_pass(const AdamwJob& job, Panels<T>& panels, const double* coupling, T* steps, double* gram) {
  const int64_t r = job.factor.r, leading = panels.leading, out_rows = round_up(r, kCombineColumns);
  Scratch& s = scratch();
  double* negative = s.square[5].reserve<double>(r * r);
  for (int64_t i = 0; i < r; ++i)  // gradient_j - sum_i Y_i (gradient^T Y)[i, j], and coupling is Y^T gradient
    for (int64_t j = 0; j < r; ++j) negative[i * r + j] = -coupling[j * r + i];
  if constexpr (std::is_same_v<T, float>)
    if (adamw_by_rows(job)) return step_of_rows(job, panels.begin, panels.end, negative, steps, gram);
  T* blocked = s.coefficients.reserve<T>(r * out_rows);
  block_coefficients(negative, r, r, r, blocked);
  // From the last chunk to the first: the cache still holds the end of what the pass before read.
  for (int64_t i = panels.last(); i >= panels.begin; i -= panels.chunk) {
    T* panel = panels.at(i);
    T* values = panel + r * leading;  // the gradient, then the step: columns past the last one are room for fours
    const int64_t rows = panels.rows(i), padded = panels.padded(i);
    combine(panel, r, leading, blocked, r, values, values, leading, padded);
    advance_chunk(job, i, rows, padded, values, leading);
    for (int64_t j = 0; j < r; ++j)
      for (int64_t k = rows; k < padded; ++k) values[j * leading + k] = T(0);
    if (steps) keep_steps(panels, i, steps);
    gram_block(panel, panels.order, panel, panels.order, leading, padded, gram, panels.order, true);
  }
}

// Y <- Y + Y (B R - I) + step R; `steps` is read where the panels were not kept.
template <typename T>
void retract_pass(const AdamwJob& job, const Panels<T>& panels, const T* steps, const double* coefficients) {
  if constexpr (std::is_same_v<T, float>)
    if (adamw_by_rows(job)) return retract_rows(job, panels.begin, panels.end, steps, coefficients);
  const int64_t r = job.factor.r, leading = panels.leading, out_rows = round_up(r, kCombineColumns);
  Scratch& s = scratch();
  T* blocked = s.coefficients.reserve<T>(2 * r * out_rows);
  block_coefficients(coefficients, r, 2 * r, r, blocked);
  T* result = s.output.reserve<T>(out_rows * leading);
  constexpr int64_t part = kCombineVectors * kLanes<T>;
  Upcoming upcoming(job);
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const int64_t rows = panels.rows(i), padded = panels.padded(i);
    T* panel = panels.slot(i);
    if (!panels.packed) {
      pack(job.factor, i, rows, padded, panel, leading, T(1));
      const T* kept = steps + steps_offset(i, r);
      for (int64_t j = 0; j < r; ++j)
        std::memcpy(panel + (r + j) * leading, kept + j * padded, static_cast<size_t>(padded) * sizeof(T));
    }
    for (int64_t k = 0; k < padded; k += part) {
      upcoming.fetch(part * r * static_cast<int64_t>(sizeof(T)));
      combine(panel + k, 2 * r, leading, blocked, r, panel + k, result + k, leading,
              padded - k < part ? padded - k : part);
    }
    unpack(result, leading, job.factor, i, rows);
  }
}

template <typename T>
bool adamw_coefficients(const AdamwJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  const double limit = std::is_same_v<T, float> ? kFloatConditionLimit : kDoubleConditionLimit;
  return retract_coefficients<T>(gram, job.factor.r, limit, coefficients, outcome);
}

bool adamw_solve(const AdamwJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  *outcome = Outcome();
  bool solved = false;
  with_arithmetic(job.factor,
                  [&](auto zero) { solved = adamw_coefficients<decltype(zero)>(job, gram, coefficients, outcome); });
  return solved;
}

// A step too large for the Gram matrix, or one that is not finite: the factor is retracted by SVD, or left alone.
void adamw_fallback(const AdamwJob& job, const void* steps, Outcome* outcome) {
  const int64_t n = job.factor.n, r = job.factor.r;
  *outcome = Outcome();
  Buffer tall;
  double* Y = tall.reserve<double>(2 * n * r);
  double* D = Y + n * r;
  pack<double>(job.factor, 0, n, n, Y, n, 1.0);
  bool finite = all_finite(job.factor, 0, n);
  const bool by_rows = adamw_by_rows(job);
  with_arithmetic(job.factor, [&](auto zero) {
    using T = decltype(zero);
    // The chunks are those of the passes; a matrix in blocks has chunks of the same size.
    const int64_t whole = chunk_rows_for(2 * r, n, sizeof(T));
    for (int64_t i = 0; i < n; i += whole) {
      const int64_t rows = n - i < whole ? n - i : whole, padded = round_up(rows, kLanes<T>);
      const T* kept = static_cast<const T*>(steps) + steps_offset(i, r);
      const int64_t row_stride = by_rows ? r : 1, col_stride = by_rows ? 1 : padded;
      for (int64_t j = 0; j < r; ++j)
        for (int64_t k = 0; k < rows; ++k) {
          const double value = static_cast<double>(kept[k * row_stride + j * col_stride]);
          finite = finite && is_finite(value);
          D[j * n + i + k] = value;
        }
    }
  });
  if (!finite) {
    outcome->status = Status::non_finite;
    outcome->residual = __builtin_nan("");
    return;
  }
  retract_by_svd(Y, D, job.factor, outcome);
}

void adamw(const AdamwJob& job, Outcome* outcome) {
  const int64_t n = job.factor.n, r = job.factor.r;
  *outcome = Outcome();
  if (n == 0 || r == 0) return;
  with_arithmetic(job.factor, [&](auto zero) {
    using T = decltype(zero);
    Panels<T> panels(&job.factor, &job.gradient, false, 1, 0, n);
    Scratch& s = scratch();
    double* coupling = s.gram.reserve<double>(4 * r * r);
    if (job.coupling) {
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < r; ++j) coupling[j * r + i] = job.coupling[i * r + j];
    } else {
      for (int64_t i = 0; i < r * r; ++i) coupling[i] = 0.0;
      coupling_pass(job, panels, coupling);
    }
    const bool in_panels = panels.kept && !adamw_by_rows(job);
    const int64_t steps_size = adamw_steps_bytes(job) / static_cast<int64_t>(sizeof(T));
    T* steps = in_panels ? nullptr : s.steps.reserve<T>(steps_size);
    double* gram = s.second_gram.reserve<double>(4 * r * r);
    for (int64_t i = 0; i < 4 * r * r; ++i) gram[i] = 0.0;
    step_pass(job, panels, coupling, steps, gram);
    panels.packed = panels.kept;
    double* coefficients = s.gram.reserve<double>(2 * r * r);
    if (adamw_coefficients<T>(job, gram, coefficients, outcome)) return retract_pass(job, panels, steps, coefficients);
    if (in_panels) {
      steps = s.steps.reserve<T>(steps_size);
      for (int64_t i = 0; i < n; i += panels.chunk) keep_steps(panels, i, steps);
    }
    adamw_fallback(job, steps, outcome);
  });
}

void adamw_coupling(const AdamwJob& job, int64_t begin, int64_t end, double* coupling) {
  with_arithmetic(job.factor, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.factor, &job.gradient, false, 1, begin, end);
    coupling_pass(job, panels, coupling);
  });
}

void adamw_step(const AdamwJob& job, int64_t begin, int64_t end, const double* coupling, void* steps, double* gram) {
  with_arithmetic(job.factor, [&](auto zero) {
    using T = decltype(zero);
    Panels<T> panels(&job.factor, &job.gradient, false, 1, begin, end);
    step_pass(job, panels, coupling, static_cast<T*>(steps), gram);
  });
}

void adamw_update(const AdamwJob& job, int64_t begin, int64_t end, const void* steps, const double* coefficients) {
  with_arithmetic(job.factor, [&](auto zero) {
    using T = decltype(zero);
    const Panels<T> panels(&job.factor, &job.gradient, false, 1, begin, end);
    retract_pass(job, panels, static_cast<const T*>(steps), coefficients);
  });
}

}  // namespace
}  // namespace stella::STELLA_ISA

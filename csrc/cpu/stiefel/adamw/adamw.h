// The whole Riemannian AdamW step of one factor: Riemannian gradient, moments, gradient scaling, tangent projection,
// polar retraction. The factor is read twice (three times where gradient^T factor is not known), the gradient once
// (twice), the moments once; between the passes the steps are kept, a factor's worth and its padding.
#pragma once

#include "stiefel/adamw/columns.h"
#include "stiefel/adamw/panels.h"
#include "stiefel/adamw/rows.h"
#include "stiefel/adamw/short.h"
#include "stiefel/retract.h"

namespace stella::STELLA_ISA {
namespace {

// Calls body with the passes that serve this job, over rows [begin, end).
template <typename Body>
void with_adamw_passes(const AdamwJob& job, int64_t begin, int64_t end, Body&& body) {
  with_arithmetic(job.factor, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      if constexpr (is_short_row(4)) {
        if (adamw_by_rows(job) && job.factor.r == 4) {
          ShortRowPasses passes(job, begin, end);
          return body(passes);
        }
      }
      if (adamw_by_rows(job)) {
        RowPasses passes(job, begin, end);
        return body(passes);
      }
    }
    if (adamw_by_columns<T>(job)) {
      ColumnPasses<T> passes(job, begin, end);
      return body(passes);
    }
    PanelPasses<T> passes(job, begin, end);
    body(passes);
  });
}

StepsLayout steps_layout(const AdamwJob& job) {
  return StepsLayout(job, job.factor.storage == Storage::float64 ? 8 : 4, adamw_by_rows(job));
}

int64_t adamw_steps_bytes(const AdamwJob& job) {
  return steps_layout(job).size() * (job.factor.storage == Storage::float64 ? 8 : 4);
}

bool adamw_steps_by_rows(const AdamwJob& job) { return job.factor.storage != Storage::float64 && adamw_by_rows(job); }

// -(gradient^T Y) from coupling = Y^T gradient: gradient_j - sum_i Y_i (gradient^T Y)[i, j] is what is wanted.
const double* negative_of(const double* coupling, int64_t r) {
  double* negative = scratch().square[5].reserve<double>(r * r);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) negative[i * r + j] = -coupling[j * r + i];
  return negative;
}

template <typename T>
bool adamw_coefficients(const AdamwJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  const Limits limits = retract_limits<T>(job.factor, true);
  if (!retract_coefficients<T>(gram, job.factor.r, limits, coefficients, outcome)) return false;
  outcome->residual = stored_residual<T>(outcome->residual, job.factor);
  return outcome->drift <= kNearDrift;  // else a moment may have overflowed: see adamw_fallback
}

bool adamw_solve(const AdamwJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  *outcome = Outcome();
  bool solved = false;
  with_arithmetic(job.factor,
                  [&](auto zero) { solved = adamw_coefficients<decltype(zero)>(job, gram, coefficients, outcome); });
  return solved;
}

bool adamw_given_finite(const AdamwJob& job) {
  return all_finite(job.factor) && all_finite(job.first_moment) && all_finite(job.second_moment);
}

// A step too large for the Gram matrix, or one that is not finite: the factor is retracted by SVD, or left alone. The
// outcome's drift is known.
void adamw_fallback(const AdamwJob& job, const void* steps, Outcome* outcome) {
  const int64_t n = job.factor.n, r = job.factor.r;
  const double drift = outcome->drift;
  *outcome = Outcome();
  outcome->drift = drift;
  Buffer tall;
  double* Y = tall.reserve<double>(2 * n * r);
  double* D = Y + n * r;
  pack<double>(job.factor, 0, n, n, Y, n, 1.0);
  bool finite = true;
  const StepsLayout layout = steps_layout(job);
  with_arithmetic(job.factor, [&](auto zero) {
    const auto* kept = static_cast<const decltype(zero)*>(steps);
    for (int64_t j = 0; j < r; ++j)
      for (int64_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(kept[layout.index(i, j)]);
        finite = finite && is_finite(value);
        D[j * n + i] = value;
      }
  });
  if (!finite || !adamw_given_finite(job)) {
    outcome->status = Status::non_finite;
    outcome->residual = __builtin_nan("");
    return;
  }
  retract_by_svd(Y, D, job.factor, outcome);
}

// Y^T gradient, given or computed in a pass.
template <typename Passes>
void coupling_of(const AdamwJob& job, Passes& passes, double* coupling) {
  const int64_t r = job.factor.r;
  if (job.coupling) {
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) coupling[j * r + i] = job.coupling[i * r + j];
  } else {
    for (int64_t i = 0; i < r * r; ++i) coupling[i] = 0.0;
    passes.coupling(coupling);
  }
}

bool all_finite(const double* square, int64_t r) {
  double sum = 0.0;
  for (int64_t i = 0; i < r * r; ++i) sum += square[i] * 0.0;
  return sum == 0.0;
}

bool adamw_fits(const AdamwJob& job, Outcome* outcome) {
  *outcome = Outcome();
  outcome->residual = outcome->drift = __builtin_nan("");
  with_arithmetic(job.factor, [&](auto zero) {
    using T = decltype(zero);
    PanelPasses<T> passes(job, 0, job.factor.n);  // any job's
    Buffer small;
    double* coupling = small.reserve<double>(job.factor.r * job.factor.r);
    coupling_of(job, passes, coupling);
    const bool fits = passes.step_fits(negative_of(coupling, job.factor.r));
    const bool given = adamw_given_finite(job) && (!job.coupling || all_finite(coupling, job.factor.r));
    outcome->status = !given ? Status::non_finite : fits ? Status::ok : Status::overflow;
    outcome->drift = passes.drift();
  });
  return outcome->status == Status::ok;
}

void adamw(const AdamwJob& job, Outcome* outcome) {
  const int64_t n = job.factor.n, r = job.factor.r;
  *outcome = Outcome();
  if (n == 0 || r == 0) return;
  with_adamw_passes(job, 0, n, [&](auto& passes) {
    using T = typename std::decay_t<decltype(passes)>::Value;
    Scratch& s = scratch();
    double* coupling = s.gram.reserve<double>(4 * r * r);
    coupling_of(job, passes, coupling);
    const int64_t steps_size = steps_layout(job).size();
    T* steps = passes.steps_in_panels() ? nullptr : s.steps.reserve<T>(steps_size);
    double* gram = s.second_gram.reserve<double>(4 * r * r);
    for (int64_t i = 0; i < 4 * r * r; ++i) gram[i] = 0.0;
    passes.step(negative_of(coupling, r), steps, gram);
    double* coefficients = s.gram.reserve<double>(2 * r * r);
    if (adamw_coefficients<T>(job, gram, coefficients, outcome)) return passes.update(steps, coefficients);
    if (!steps) {
      steps = s.steps.reserve<T>(steps_size);
      passes.keep_steps(steps);
    }
    adamw_fallback(job, steps, outcome);
  });
}

void adamw_coupling(const AdamwJob& job, int64_t begin, int64_t end, double* coupling) {
  with_adamw_passes(job, begin, end, [&](auto& passes) { passes.coupling(coupling); });
}

void adamw_step(const AdamwJob& job, int64_t begin, int64_t end, const double* coupling, void* steps, double* gram) {
  with_adamw_passes(job, begin, end, [&](auto& passes) {
    using T = typename std::decay_t<decltype(passes)>::Value;
    passes.step(negative_of(coupling, job.factor.r), static_cast<T*>(steps), gram);
  });
}

void adamw_update(const AdamwJob& job, int64_t begin, int64_t end, const void* steps, const double* coefficients) {
  with_adamw_passes(job, begin, end, [&](auto& passes) {
    using T = typename std::decay_t<decltype(passes)>::Value;
    passes.update(static_cast<const T*>(steps), coefficients);
  });
}

}  // namespace
}  // namespace stella::STELLA_ISA

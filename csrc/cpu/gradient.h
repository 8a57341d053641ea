// The Riemannian gradient of one factor, in place.
#pragma once

#include "passes.h"

namespace stella::STELLA_ISA {
namespace {

// K = gradient^T Y, added to `gram` (r x r).
template <typename T>
void cross_pass(Panels<T>& panels, double* gram) {
  const int64_t r = panels.first->r;
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    gram_block(panel, r, panel + r * panels.leading, r, panels.leading, panels.padded(i), gram, r, false);
  }
  panels.packed = panels.kept;
}

// gradient += Y (-K): turns K into coefficients in place.
template <typename T>
void subtract_pass(const Panels<T>& panels, const MatrixView& gradient, const double* gram) {
  const int64_t r = gradient.r;
  Buffer small;
  double* coefficients = small.reserve<double>(r * r);
  for (int64_t i = 0; i < r * r; ++i) coefficients[i] = -gram[i];
  update_pass(panels, coefficients, r, true, gradient, nullptr);
}

void gradient(const GradientJob& job) {
  if (job.gradient.n == 0 || job.gradient.r == 0) return;
  with_arithmetic(job.gradient, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, 0, job.gradient.n);
    double* gram = zeroed_gram(job.gradient.r);
    cross_pass(panels, gram);
    subtract_pass(panels, job.gradient, gram);
  });
}

void gradient_gram(const GradientJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.gradient, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, begin, end);
    cross_pass(panels, gram);
  });
}

void gradient_update(const GradientJob& job, int64_t begin, int64_t end, const double* gram) {
  with_arithmetic(job.gradient, [&](auto zero) {
    const Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, begin, end);
    subtract_pass(panels, job.gradient, gram);
  });
}

}  // namespace
}  // namespace stella::STELLA_ISA

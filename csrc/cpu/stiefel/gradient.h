// The Riemannian gradient of one factor, in place.
#pragma once

#include "stiefel/passes.h"
#include "stiefel/value_range.h"

namespace stella::STELLA_ISA {
namespace {

// A copy past the cache: a snapshot is not read before the optimizer has moved every factor.
void stream_copy(char* to, const char* from, size_t bytes) {
#ifdef __SSE2__
  while (bytes >= 16 && reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    *to++ = *from++;
    --bytes;
  }
  for (; bytes >= 16; to += 16, from += 16, bytes -= 16) stream_part(to, from);
#endif
  std::memcpy(to, from, bytes);
}

// Rows [begin, begin + rows) of the factor to the snapshot, while they are in the cache.
template <typename T>
void copy_rows(const GradientJob& job, int64_t begin, int64_t rows, const T* panel, int64_t leading) {
  const MatrixView &from = job.factor, &to = job.snapshot;
  if (!to.data) return;
  const size_t bytes = static_cast<size_t>(bytes_of(from.storage));
  const bool alike = from.storage == to.storage && from.row_stride == to.row_stride && from.col_stride == to.col_stride;
  const char* source = static_cast<const char*>(from.data);
  char* target = static_cast<char*>(to.data);
  if (alike && from.col_stride == 1 && from.row_stride == from.r) {
    const size_t offset = static_cast<size_t>(begin * from.r) * bytes;
    stream_copy(target + offset, source + offset, static_cast<size_t>(rows * from.r) * bytes);
  } else if (alike && from.row_stride == 1) {
    for (int64_t j = 0; j < from.r; ++j) {
      const size_t offset = static_cast<size_t>(begin + j * from.col_stride) * bytes;
      stream_copy(target + offset, source + offset, static_cast<size_t>(rows) * bytes);
    }
  } else {
    unpack(panel, leading, to, begin, rows);  // exact: the panel holds the values themselves
  }
}

// Streamed stores are ordered before whatever other threads are told next.
void stream_fence(const GradientJob& job) {
#ifdef __SSE2__
  if (job.snapshot.data) _mm_sfence();
#else
  (void)job;
#endif
}

// K = gradient^T Y and C = Y^T Y (its upper triangle at least), added to `gram`, one r x r after the other.
template <typename T>
void cross_pass(const GradientJob& job, Panels<T>& panels, double* gram) {
  const int64_t r = panels.first->r, leading = panels.leading;
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    const T* factor = panel + r * leading;
    copy_rows(job, i, panels.rows(i), factor, leading);
    gram_block(panel, leading, r, factor, leading, r, panels.padded(i), gram, r, false);
    gram_block(factor, leading, r, factor, leading, r, panels.padded(i), gram + r * r, r, true);
  }
  panels.packed = panels.kept;
}

// -K
const double* negative_coupling(const double* gram, int64_t r, Buffer& small) {
  double* coefficients = small.reserve<double>(r * r);
  for (int64_t i = 0; i < r * r; ++i) coefficients[i] = -gram[i];
  return coefficients;
}

// gradient += Y (-K)
template <typename T>
void subtract_pass(const Panels<T>& panels, const MatrixView& gradient, const double* gram) {
  Buffer small;
  update_pass(panels, negative_coupling(gram, gradient.r, small), gradient.r, true, gradient, nullptr);
}

// Whether gradient - Y K stays finite when it is stored; it is computed, and written nowhere.
template <typename T>
bool difference_fits(const Panels<T>& panels, const MatrixView& gradient, const double* gram) {
  const int64_t r = gradient.r;
  Buffer small;
  bool finite = true;
  for_updated_chunks(panels, negative_coupling(gram, r, small), r, true, [&](const T* result, int64_t i) {
    finite = finite && fits(result, panels.leading, panels.rows(i), r, gradient.storage);
  });
  return finite;
}

// A gradient is finite when it comes here. What cannot be bounded beforehand is tried, and the gradient left alone
// where it overflows or the factor is not finite.
template <typename T>
bool accept(const GradientJob& job, const Panels<T>& panels, const double* gram, bool bounded, Outcome* outcome) {
  const int64_t r = job.gradient.r;
  outcome->drift = root_of_sum(gram + r * r, r, r);
  if (bounded && outcome->drift <= kNearDrift) return true;
  if (!all_finite(job.factor))
    outcome->status = Status::non_finite;
  else if (!difference_fits(panels, job.gradient, gram))
    outcome->status = Status::overflow;
  return outcome->status == Status::ok;
}

// Calls body with the panels of rows [begin, end).
template <typename Body>
void with_gradient_panels(const GradientJob& job, int64_t begin, int64_t end, Body&& body) {
  with_arithmetic(job.gradient, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, begin, end);
    body(panels);
  });
}

void gradient(const GradientJob& job, Outcome* outcome) {
  const int64_t n = job.gradient.n, r = job.gradient.r;
  if (n == 0 || r == 0) return;
  with_gradient_panels(job, 0, n, [&](auto& panels) {
    double* gram = zeroed_blocks(2, r);
    cross_pass(job, panels, gram);
    stream_fence(job);
    if (accept(job, panels, gram, true, outcome)) subtract_pass(panels, job.gradient, gram);
  });
}

void gradient_gram(const GradientJob& job, int64_t begin, int64_t end, double* gram) {
  with_gradient_panels(job, begin, end, [&](auto& panels) {
    cross_pass(job, panels, gram);
    stream_fence(job);
  });
}

bool gradient_accept(const GradientJob& job, const double* gram, bool bounded, Outcome* outcome) {
  *outcome = Outcome();
  bool accepted = false;
  with_gradient_panels(job, 0, job.gradient.n,
                       [&](auto& panels) { accepted = accept(job, panels, gram, bounded, outcome); });
  return accepted;
}

void gradient_update(const GradientJob& job, int64_t begin, int64_t end, const double* gram) {
  with_gradient_panels(job, begin, end, [&](auto& panels) { subtract_pass(panels, job.gradient, gram); });
}

}  // namespace
}  // namespace stella::STELLA_ISA

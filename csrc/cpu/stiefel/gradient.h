// The Riemannian gradient of one factor, in place.
#pragma once

#include "stiefel/passes.h"

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

// K = gradient^T Y, added to `gram` (r x r).
template <typename T>
void cross_pass(const GradientJob& job, Panels<T>& panels, double* gram) {
  const int64_t r = panels.first->r;
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    const T* factor = panel + r * panels.leading;
    copy_rows(job, i, panels.rows(i), factor, panels.leading);
    gram_block(panel, panels.leading, r, factor, panels.leading, r, panels.padded(i), gram, r, false);
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

bool coupling_finite(const double* gram, int64_t r) {
  double sum = 0.0;
  for (int64_t i = 0; i < r * r; ++i) sum += gram[i] * 0.0;
  return sum == 0.0;
}

// A gradient is finite when it comes here; a K that is not finite betrays the factor, and the gradient is left alone.
void gradient(const GradientJob& job, Outcome* outcome) {
  if (job.gradient.n == 0 || job.gradient.r == 0) return;
  with_arithmetic(job.gradient, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, 0, job.gradient.n);
    double* gram = zeroed_gram(job.gradient.r);
    cross_pass(job, panels, gram);
    stream_fence(job);
    if (coupling_finite(gram, job.gradient.r))
      subtract_pass(panels, job.gradient, gram);
    else
      outcome->status = Status::non_finite;
  });
}

void gradient_gram(const GradientJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.gradient, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, begin, end);
    cross_pass(job, panels, gram);
    stream_fence(job);
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

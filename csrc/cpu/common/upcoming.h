// Memory that a thread reads next, asked for a few lines at a time while it computes on what is in its cache.
#pragma once

#include "common/kernels.h"
#include "common/vector.h"

namespace stella::STELLA_ISA {
namespace {

class Upcoming {
 public:
  explicit Upcoming(const AdamwJob& job)
      : factor_(static_cast<const char*>(job.upcoming_factor)),
        gradient_(static_cast<const char*>(job.upcoming_gradient)),
        left_(job.upcoming_bytes < kMost ? job.upcoming_bytes : kMost) {}

  // `bytes` of each of the two.
  STELLA_INLINE void fetch(int64_t bytes) {
    for (; left_ > 0 && bytes > 0; left_ -= 64, bytes -= 64, factor_ += 64, gradient_ += 64) {
      __builtin_prefetch(factor_, 0, 2);
      __builtin_prefetch(gradient_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kMost = 128 << 10;  // of each: half of a usual L2, the other half is in use
  const char *factor_, *gradient_;
  int64_t left_;
};

}  // namespace
}  // namespace stella::STELLA_ISA

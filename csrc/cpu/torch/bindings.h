// What the operators share on torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "stiefel/schedule.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace stella::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const Pool& pool() {
  static thread_local Pool p;
  p.threads = torch::stable::get_num_threads();
  if (!p.parallel_for)
    p.parallel_for = [](int64_t count, const std::function<void(int64_t)>& body) {
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
      });
    };
  return p;
}

inline void* data_of(const Tensor& t) { return t.mutable_data_ptr(); }

// A large result is fresh memory: faulting it in by 4 KiB pages takes longer than the kernel that fills it.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2u << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure is harmless
#else
  (void)data;
  (void)bytes;
#endif
}

// What an operator over lists returns: a row for each factor.
inline Tensor info_of(const std::vector<Outcome>& outcomes) {
  constexpr int64_t kColumns = 5;
  Tensor info = torch::stable::empty({static_cast<int64_t>(outcomes.size()), kColumns}, ScalarType::Double);
  double* row = static_cast<double*>(info.mutable_data_ptr());
  for (const Outcome& o : outcomes) {
    row[0] = static_cast<double>(o.status);
    row[1] = o.residual;
    row[2] = o.iterations;
    row[3] = static_cast<double>(o.path);
    row[4] = o.drift;
    row += kColumns;
  }
  return info;
}

// Results of this size or more are written past the cache.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kStreamedBytes = 4 << 10;  // the small cases of tests/sanitize take that path too
#else
constexpr int64_t kStreamedBytes = 16 << 20;
#endif

}  // namespace stella::bindings

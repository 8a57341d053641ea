// Memory that a thread keeps between calls, so that a step allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/vector.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace stella::STELLA_ISA {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <typename T>
  T* reserve(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = nullptr;
      bytes_ = 0;
      if (posix_memalign(&data_, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
      bytes_ = bytes;
    }
#ifdef __SANITIZE_ADDRESS__
    // What an earlier call had reserved beyond this is out of bounds now.
    __asan_unpoison_memory_region(data_, static_cast<size_t>(bytes_));
    __asan_poison_memory_region(static_cast<T*>(data_) + count,
                                static_cast<size_t>(bytes_) - static_cast<size_t>(count) * sizeof(T));
#endif
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

struct Scratch {
  Buffer panel, output, coefficients, solved, gram, second_gram, square[9], vectors, tall, steps;
};

inline Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

STELLA_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace stella::STELLA_ISA

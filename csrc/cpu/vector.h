// Vectors of one instruction set, written with the compiler's vector extension so that one source serves them all.
// Every file that includes this one is compiled once per instruction set, inside the namespace STELLA_ISA.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifndef STELLA_ISA
#error "compile with -DSTELLA_ISA=<name> and -DSTELLA_VECTOR_BYTES=<16|32|64>"
#endif

#define STELLA_INLINE inline __attribute__((always_inline))

namespace stella::STELLA_ISA {

template <typename T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};

template <typename T>
constexpr int kLanes = STELLA_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename T>
using Vector = typename VectorOf<T, kLanes<T>>::type;

// 16 architectural registers for SSE2 and AVX2, 32 for AVX-512 and NEON.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <typename V, typename T>
STELLA_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V, typename T>
STELLA_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define STELLA_SHUFFLE 1
#endif
#endif

#ifdef STELLA_SHUFFLE
// Adds the upper half of the lanes to the lower half. By shuffles, not by address: a vector whose address is taken
// lives in memory, and with it every accumulator that is folded after its loop.
template <typename T, int lanes, int... low>
STELLA_INLINE typename VectorOf<T, lanes / 2>::type fold(typename VectorOf<T, lanes>::type v,
                                                         std::integer_sequence<int, low...>) {
  return __builtin_shufflevector(v, v, low...) + __builtin_shufflevector(v, v, (low + lanes / 2)...);
}

template <typename T, int lanes>
STELLA_INLINE typename VectorOf<T, lanes / 2>::type fold(typename VectorOf<T, lanes>::type v) {
  return fold<T, lanes>(v, std::make_integer_sequence<int, lanes / 2>());
}
#endif

// The sums of the lanes of four vectors, as four values.
template <typename T, int lanes>
STELLA_INLINE void sum_lanes(typename VectorOf<T, lanes>::type a, typename VectorOf<T, lanes>::type b,
                             typename VectorOf<T, lanes>::type c, typename VectorOf<T, lanes>::type d, T* out) {
#ifdef STELLA_SHUFFLE
  if constexpr (lanes == 4) {
    auto ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    auto cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(out, __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
    return;
  } else if constexpr (lanes == 2) {
    store(out, __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3));
    store(out + 2, __builtin_shufflevector(c, d, 0, 2) + __builtin_shufflevector(c, d, 1, 3));
    return;
  } else {
    sum_lanes<T, lanes / 2>(fold<T, lanes>(a), fold<T, lanes>(b), fold<T, lanes>(c), fold<T, lanes>(d), out);
    return;
  }
#else
  for (int i = 0; i < 4; ++i) out[i] = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    out[0] += a[lane];
    out[1] += b[lane];
    out[2] += c[lane];
    out[3] += d[lane];
  }
#endif
}

}  // namespace stella::STELLA_ISA

// Vectors of one instruction set, written with the compiler's vector extension so that one source serves them all.
// Every file that includes this one is compiled once per instruction set, inside the namespace STELLA_ISA.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

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

// A sanitizer does not see what the instructions that store past the cache write: under one they are plain stores, of
// the same alignment.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

#ifdef __SSE2__
// 16 bytes past the cache; `to` is aligned to them.
STELLA_INLINE void stream_part(void* to, const void* from) {
  const __m128i part = _mm_loadu_si128(static_cast<const __m128i*>(from));
  if constexpr (kSanitized)
    *static_cast<__m128i*>(to) = part;
  else
    _mm_stream_si128(static_cast<__m128i*>(to), part);
}
#endif

// The square root of every lane; the compilers' vector extension has none.
template <typename V>
STELLA_INLINE V square_root(V v) {
  constexpr bool is_float = sizeof(v[0]) == 4;
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64 && is_float) return reinterpret_cast<V>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
  if constexpr (sizeof(V) == 64) return reinterpret_cast<V>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(v)));
#endif
#ifdef __AVX__
  if constexpr (sizeof(V) == 32 && is_float) return reinterpret_cast<V>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
  if constexpr (sizeof(V) == 32) return reinterpret_cast<V>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(v)));
#endif
#ifdef __SSE2__
  if constexpr (sizeof(V) == 16 && is_float) return reinterpret_cast<V>(_mm_sqrt_ps(reinterpret_cast<__m128>(v)));
  if constexpr (sizeof(V) == 16) return reinterpret_cast<V>(_mm_sqrt_pd(reinterpret_cast<__m128d>(v)));
#endif
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  for (int i = 0; i < lanes; ++i) {
    if constexpr (is_float)
      v[i] = __builtin_sqrtf(v[i]);
    else
      v[i] = __builtin_sqrt(v[i]);
  }
  return v;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define STELLA_SHUFFLE 1
#endif
#endif

// Lane i of the result is lane from[i] of v.
template <int... from, typename V>
STELLA_INLINE V permute(V v) {
#ifdef STELLA_SHUFFLE
  return __builtin_shufflevector(v, v, from...);
#else
  return V{v[from]...};
#endif
}

#ifdef STELLA_SHUFFLE
// Adds the upper half of the lanes to the lower half. By shuffles, not by address: a vector whose address is taken
// lives in memory, and with it every accumulator that is folded after its loop.
template <typename T, int lanes, int... low>
STELLA_INLINE typename VectorOf<T, lanes / 2>::type fold(typename VectorOf<T, lanes>::type v,
                                                         std::integer_sequence<int, low...>) {
  return __builtin_shufflevector(v, v, low...) + __builtin_shufflevector(v, v, (low + lanes / 2)...);
}

// The sums of 128-bit parts of the lanes, as one such part.
template <typename T, int lanes>
STELLA_INLINE typename VectorOf<T, 16 / sizeof(T)>::type fold_to_part(typename VectorOf<T, lanes>::type v) {
  if constexpr (lanes * sizeof(T) == 16)
    return v;
  else
    return fold_to_part<T, lanes / 2>(fold<T, lanes>(v, std::make_integer_sequence<int, lanes / 2>()));
}

// Within every 128-bit part: a and b in turn, each the sum of its values `apart` lanes apart.
template <typename T, int lanes, int apart, int... i>
STELLA_INLINE typename VectorOf<T, lanes>::type add_apart(typename VectorOf<T, lanes>::type a,
                                                          typename VectorOf<T, lanes>::type b,
                                                          std::integer_sequence<int, i...>) {
  constexpr int part = 16 / sizeof(T);
  if constexpr (apart == 2)  // a0 b0 a1 b1 and a2 b2 a3 b3
    return __builtin_shufflevector(a, b, (i / part * part + i % part / 2 + i % 2 * lanes)...) +
           __builtin_shufflevector(a, b, (i / part * part + i % part / 2 + i % 2 * lanes + 2)...);
  else if constexpr (part == 4)  // a0 a1 b0 b1 and a2 a3 b2 b3
    return __builtin_shufflevector(a, b, (i / part * part + i % 2 + i % part / 2 * lanes)...) +
           __builtin_shufflevector(a, b, (i / part * part + i % 2 + i % part / 2 * lanes + 2)...);
  else  // a0 b0 and a1 b1
    return __builtin_shufflevector(a, b, (i / part * part + i % 2 * lanes)...) +
           __builtin_shufflevector(a, b, (i / part * part + i % 2 * lanes + 1)...);
}
#endif

template <typename T>
using Four = typename VectorOf<T, 4>::type;

// The sums of the lanes of four vectors.
template <typename T, int lanes>
STELLA_INLINE Four<T> sum_lanes(typename VectorOf<T, lanes>::type a, typename VectorOf<T, lanes>::type b,
                                typename VectorOf<T, lanes>::type c, typename VectorOf<T, lanes>::type d) {
#ifdef STELLA_SHUFFLE
  constexpr auto all = std::make_integer_sequence<int, lanes>();
  if constexpr (sizeof(T) == 4) {
    const auto ab = add_apart<T, lanes, 2>(a, b, all), cd = add_apart<T, lanes, 2>(c, d, all);
    return fold_to_part<T, lanes>(add_apart<T, lanes, 1>(ab, cd, all));
  } else {
    const auto ab = fold_to_part<T, lanes>(add_apart<T, lanes, 1>(a, b, all));
    const auto cd = fold_to_part<T, lanes>(add_apart<T, lanes, 1>(c, d, all));
    return __builtin_shufflevector(ab, cd, 0, 1, 2, 3);
  }
#else
  Four<T> sums = {};
  for (int lane = 0; lane < lanes; ++lane) {
    sums[0] += a[lane];
    sums[1] += b[lane];
    sums[2] += c[lane];
    sums[3] += d[lane];
  }
  return sums;
#endif
}

}  // namespace stella::STELLA_ISA

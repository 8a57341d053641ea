// Philox-4x32-10 and the dropout mask of reference/philox.py: element i takes word i % 4 of the block whose counter is
// i / 4. Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>

#include "adapter/kernels.h"
#include "common/scratch.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int kPhiloxRounds = 10;
constexpr uint64_t kPhiloxFirst = 0xD2511F53u, kPhiloxSecond = 0xCD9E8D57u;

struct PhiloxKeys {
  uint64_t first[kPhiloxRounds], second[kPhiloxRounds];  // 32 bits each, wide so that one load broadcasts them

  explicit PhiloxKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kPhiloxRounds; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      first[i] = k0;
      second[i] = k1;
    }
  }
};

STELLA_INLINE void philox_block(uint64_t counter, const PhiloxKeys& keys, uint32_t* words) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const uint64_t a = kPhiloxFirst * c0, b = kPhiloxSecond * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ static_cast<uint32_t>(keys.first[i]);
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ static_cast<uint32_t>(keys.second[i]);
    c3 = static_cast<uint32_t>(a);
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

constexpr int64_t kPhiloxRun = 8;  // blocks at a time

#if defined(__AVX2__)
// Four counters a vector, each word in the low half of 64 bits: a product needs no shuffling, and what is left in the
// upper halves is never read.
STELLA_INLINE __m256i broadcast(uint64_t value) { return _mm256_set1_epi64x(static_cast<int64_t>(value)); }

STELLA_INLINE __m256i high_half(__m256i v) { return _mm256_srli_epi64(v, 32); }

STELLA_INLINE __m256i xor_of(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }

// The masks of eight blocks whose counters share their upper half.
STELLA_INLINE void mask_run(uint64_t counter, const PhiloxKeys& keys, uint32_t threshold, uint32_t* mask) {
  const __m256i first_factor = broadcast(kPhiloxFirst), second_factor = broadcast(kPhiloxSecond);
  __m256i c0[2], c1[2], c2[2], c3[2];
  // The first two rounds, of which half is the same in every lane: two of a counter's words are zero.
  const uint64_t top = (counter >> 32) ^ keys.first[0], top_product = kPhiloxFirst * top;
  const __m256i low = broadcast(counter & 0xFFFFFFFFu);
  for (int v = 0; v < 2; ++v) {  // in the order in which the interleaving below puts them back in sequence
    const __m256i block = _mm256_add_epi64(low, _mm256_set_epi64x(4 * v + 3, 4 * v + 1, 4 * v + 2, 4 * v));
    const __m256i a = _mm256_mul_epu32(block, first_factor);
    const __m256i b = _mm256_mul_epu32(xor_of(high_half(a), broadcast(keys.second[0])), second_factor);
    c0[v] = xor_of(high_half(b), broadcast(keys.first[1]));
    c1[v] = b;
    c2[v] = xor_of(a, broadcast((top_product >> 32) ^ keys.second[1]));
    c3[v] = broadcast(top_product);
  }
#pragma GCC unroll 8
  for (int i = 2; i < kPhiloxRounds; ++i)
    for (int v = 0; v < 2; ++v) {
      const __m256i a = _mm256_mul_epu32(c0[v], first_factor), b = _mm256_mul_epu32(c2[v], second_factor);
      c0[v] = xor_of(high_half(b), xor_of(c1[v], broadcast(keys.first[i])));
      c2[v] = xor_of(high_half(a), xor_of(c3[v], broadcast(keys.second[i])));
      c1[v] = b;
      c3[v] = a;
    }
  // Unsigned word >= threshold, as not (threshold > word) on shifted signed values.
  const __m256i flip = _mm256_set1_epi32(INT32_MIN);
  const __m256i bound = _mm256_set1_epi32(static_cast<int32_t>(threshold ^ 0x80000000u));
  const __m256i ones = _mm256_set1_epi32(-1);
  for (int v = 0; v < 2; ++v) {
    const __m256i first = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
    const __m256i second = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
    const __m256i words[2] = {_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second)};
    for (int h = 0; h < 2; ++h) {
      const __m256i dropped = _mm256_cmpgt_epi32(bound, _mm256_xor_si256(words[h], flip));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + 16 * v + 8 * h), _mm256_xor_si256(dropped, ones));
    }
  }
}
#else
STELLA_INLINE void mask_run(uint64_t counter, const PhiloxKeys& keys, uint32_t threshold, uint32_t* mask) {
  for (int64_t b = 0; b < kPhiloxRun; ++b) {
    philox_block(counter + static_cast<uint64_t>(b), keys, mask + 4 * b);
    for (int i = 0; i < 4; ++i) mask[4 * b + i] = mask[4 * b + i] >= threshold ? ~0u : 0u;
  }
}
#endif

// What is kept of a value: itself where the mask is all ones, +0 where it is zero, also of a NaN.
STELLA_INLINE float kept(float value, uint32_t mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= mask;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

STELLA_INLINE double kept(double value, uint32_t mask) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(mask)));
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

constexpr int64_t kMaskPadding = 8 * kPhiloxRun;  // words that mask_of may write beyond those asked for

// Masks of elements [begin, begin + count), all ones where kept; returns where in `buffer` the first one is.
const uint32_t* mask_of(const Dropout& dropout, const PhiloxKeys& keys, int64_t begin, int64_t count,
                        uint32_t* buffer) {
  if (dropout.threshold > 0xFFFFFFFFu) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = 0;
    return buffer;
  }
  const uint32_t threshold = static_cast<uint32_t>(dropout.threshold);
  const int64_t first = begin / 4, last = (begin + count + 3) / 4;
  uint32_t* mask = buffer;
  for (int64_t b = first; b < last; b += kPhiloxRun, mask += 4 * kPhiloxRun) {
    const uint64_t counter = static_cast<uint64_t>(b);
    if ((counter & 0xFFFFFFFFu) + kPhiloxRun <= (uint64_t(1) << 32)) {
      mask_run(counter, keys, threshold, mask);
    } else {
      for (int64_t k = 0; k < kPhiloxRun; ++k) {
        philox_block(counter + static_cast<uint64_t>(k), keys, mask + 4 * k);
        for (int i = 0; i < 4; ++i) mask[4 * k + i] = mask[4 * k + i] >= threshold ? ~0u : 0u;
      }
    }
  }
  return buffer + begin % 4;
}

}  // namespace
}  // namespace stella::STELLA_ISA

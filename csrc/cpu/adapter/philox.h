// Philox-4x32-7 and the dropout mask of reference/philox.py: of a row each eight columns take the 16-bit halves of a
// block's words, in their order in memory; its counter is (column / 8, row, row >> 32, 0). Salmon, Moraes, Dror and
// Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>

#include "adapter/kernels.h"
#include "common/scratch.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int kPhiloxRounds = 7;
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

constexpr int64_t kPhiloxRun = 8, kPhiloxElements = 8;  // blocks at a time, elements of one

#if defined(__AVX2__)
// Four counters a vector, each word in the low half of 64 bits: a product needs no shuffling, and what is left in the
// upper halves is never read.
STELLA_INLINE __m256i broadcast(uint64_t value) { return _mm256_set1_epi64x(static_cast<int64_t>(value)); }

STELLA_INLINE __m256i high_half(__m256i v) { return _mm256_srli_epi64(v, 32); }

STELLA_INLINE __m256i xor_of(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }

// The masks of eight blocks of a row.
STELLA_INLINE void mask_run(uint32_t first, uint64_t row, const PhiloxKeys& keys, uint32_t threshold, uint32_t* mask) {
  const __m256i first_factor = broadcast(kPhiloxFirst), second_factor = broadcast(kPhiloxSecond);
  __m256i c0[2], c1[2], c2[2], c3[2];
  // The first two rounds, of which half is the same in every lane.
  const uint64_t rest = kPhiloxSecond * (row >> 32);
  const uint64_t top_product = kPhiloxFirst * ((row & 0xFFFFFFFFu) ^ rest >> 32 ^ keys.first[0]);
  const __m256i low = broadcast(first);
  for (int v = 0; v < 2; ++v) {  // in the order in which the interleaving below puts them back in sequence
    const __m256i block = _mm256_add_epi64(low, _mm256_set_epi64x(4 * v + 3, 4 * v + 1, 4 * v + 2, 4 * v));
    const __m256i a = _mm256_mul_epu32(block, first_factor);
    const __m256i b = _mm256_mul_epu32(xor_of(high_half(a), broadcast(keys.second[0])), second_factor);
    c0[v] = xor_of(high_half(b), broadcast((rest & 0xFFFFFFFFu) ^ keys.first[1]));
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
  const __m256i bound = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  for (int v = 0; v < 2; ++v) {
    const __m256i even = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
    const __m256i odd = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
    const __m256i words[2] = {_mm256_unpacklo_epi64(even, odd), _mm256_unpackhi_epi64(even, odd)};
    for (int h = 0; h < 2; ++h) {
      const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(words[h], bound), words[h]);
      __m256i* to = reinterpret_cast<__m256i*>(mask + 32 * v + 16 * h);
      _mm256_storeu_si256(to, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(kept)));
      _mm256_storeu_si256(to + 1, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(kept, 1)));
    }
  }
}
#else
STELLA_INLINE void philox_block(uint32_t block, uint64_t row, const PhiloxKeys& keys, uint32_t* words) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
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

STELLA_INLINE void mask_run(uint32_t first, uint64_t row, const PhiloxKeys& keys, uint32_t threshold, uint32_t* mask) {
  for (uint32_t b = 0; b < kPhiloxRun; ++b) {
    uint32_t words[kPhiloxElements / 2];
    philox_block(first + b, row, keys, words);
    for (int i = 0; i < kPhiloxElements; ++i, ++mask) {
      const uint32_t number = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFu;
      *mask = number >= threshold ? ~0u : 0u;
    }
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

// Words that mask_of may write beyond those asked for.
constexpr int64_t kMaskPadding = (kPhiloxRun + 1) * kPhiloxElements;

// Masks of columns [begin, begin + count) of a row, all ones where kept; returns where in `buffer` the first one is.
const uint32_t* mask_of(const Dropout& dropout, const PhiloxKeys& keys, int64_t row, int64_t begin, int64_t count,
                        uint32_t* buffer) {
  if (dropout.threshold > 0xFFFFu) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = 0;
    return buffer;
  }
  const uint32_t threshold = static_cast<uint32_t>(dropout.threshold);
  const int64_t first = begin / kPhiloxElements, last = (begin + count + kPhiloxElements - 1) / kPhiloxElements;
  uint32_t* mask = buffer;
  for (int64_t b = first; b < last; b += kPhiloxRun, mask += kPhiloxElements * kPhiloxRun)
    mask_run(static_cast<uint32_t>(b), static_cast<uint64_t>(row), keys, threshold, mask);
  return buffer + begin % kPhiloxElements;
}

}  // namespace
}  // namespace stella::STELLA_ISA

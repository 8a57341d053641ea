// Numbers of 16 bits and tf32, to and from float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float from_bfloat16(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

// To the nearest, ties to even; every NaN to the canonical one.
inline uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = bits_as<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else {
    magnitude = std::ldexp(static_cast<float>(exponent ? fraction | 0x400 : fraction),
                           exponent ? static_cast<int>(exponent) - 25 : -24);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (std::isnan(value)) return 0x7fff;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds past the largest
  if (magnitude < 6.103515625e-05f) {               // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10)));
}

// The operand of a tf32 product: what a unit reads of a register, its lowest 13 bits ignored.
inline float read_tf32(uint32_t bits) { return bits_as<float>(bits & 0xffffe000u); }

// cvt.rna: to the nearest, ties away from zero.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return std::isnan(value) ? 0x7fffffffu & ~0x1fffu : bits;
  return (bits + 0x1000) & 0xffffe000u;
}

}  // namespace ptx

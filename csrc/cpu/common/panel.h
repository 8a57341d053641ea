// Packing: a chunk of rows of an (n, r) matrix, of any storage, becomes r contiguous columns in the arithmetic type.
// Columns side by side let every kernel run along n, so no rank is a special case and a transposed factor costs
// nothing.
#pragma once

#include <type_traits>

#include "common/kernels.h"
#include "common/vector.h"

namespace stella::STELLA_ISA {

STELLA_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

STELLA_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

STELLA_INLINE float widen(float value) { return value; }
STELLA_INLINE double widen(double value) { return value; }
STELLA_INLINE float widen(Bfloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

STELLA_INLINE float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // A product by 2^112 rebiases the exponent and normalises subnormals exactly.
  return bits_to_float(float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f) | sign);
}

template <typename S>
struct Narrow;

template <>
struct Narrow<float> {
  template <typename T>
  static STELLA_INLINE float from(T value) {
    return static_cast<float>(value);
  }
};

template <>
struct Narrow<double> {
  template <typename T>
  static STELLA_INLINE double from(T value) {
    return static_cast<double>(value);
  }
};

template <>
struct Narrow<Bfloat16> {
  template <typename T>
  static STELLA_INLINE Bfloat16 from(T value) {
    const uint32_t bits = float_to_bits(static_cast<float>(value));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};  // to nearest, ties to even
  }
};

template <>
struct Narrow<Float16> {
  template <typename T>
  static STELLA_INLINE Float16 from(T value) {
    const uint32_t bits = float_to_bits(static_cast<float>(value));
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
      const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f);
      return {static_cast<uint16_t>(sign | (shifted - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
  }
};

// Calls body(S*) with the pointer type of the view's storage.
template <typename Body>
STELLA_INLINE void with_storage(const MatrixView& view, Body&& body) {
  switch (view.storage) {
    case Storage::float32:
      return body(static_cast<float*>(view.data));
    case Storage::float64:
      return body(static_cast<double*>(view.data));
    case Storage::bfloat16:
      return body(static_cast<Bfloat16*>(view.data));
    case Storage::float16:
      return body(static_cast<Float16*>(view.data));
  }
}

#if defined(STELLA_SHUFFLE) && STELLA_VECTOR_BYTES >= 32
// Eight rows of four columns to four columns of eight rows and back, in pairs of 128-bit lanes.
typedef float Float8 __attribute__((vector_size(32)));

STELLA_INLINE void transpose_lanes(Float8& a, Float8& b, Float8& c, Float8& d) {
  const Float8 t0 = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  const Float8 t1 = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  const Float8 t2 = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13);
  const Float8 t3 = __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  a = __builtin_shufflevector(t0, t2, 0, 1, 8, 9, 4, 5, 12, 13);
  b = __builtin_shufflevector(t0, t2, 2, 3, 10, 11, 6, 7, 14, 15);
  c = __builtin_shufflevector(t1, t3, 0, 1, 8, 9, 4, 5, 12, 13);
  d = __builtin_shufflevector(t1, t3, 2, 3, 10, 11, 6, 7, 14, 15);
}

STELLA_INLINE Float8 load_pair(const float* low, const float* high) {
  typedef float Float4 __attribute__((vector_size(16)));
  return __builtin_shufflevector(load<Float4>(low), load<Float4>(high), 0, 1, 2, 3, 4, 5, 6, 7);
}

STELLA_INLINE void store_pair(float* low, float* high, Float8 v) {
  std::memcpy(low, &v, 16);
  std::memcpy(high, reinterpret_cast<const char*>(&v) + 16, 16);
}

constexpr int kTransposeRows = 8;

STELLA_INLINE void transpose_in(const float* from, int64_t stride, float* to, int64_t leading) {
  Float8 a = load_pair(from, from + 4 * stride), b = load_pair(from + stride, from + 5 * stride);
  Float8 c = load_pair(from + 2 * stride, from + 6 * stride), d = load_pair(from + 3 * stride, from + 7 * stride);
  transpose_lanes(a, b, c, d);
  store(to, a);
  store(to + leading, b);
  store(to + 2 * leading, c);
  store(to + 3 * leading, d);
}

STELLA_INLINE void transpose_out(const float* from, int64_t leading, float* to, int64_t stride) {
  Float8 a = load<Float8>(from), b = load<Float8>(from + leading);
  Float8 c = load<Float8>(from + 2 * leading), d = load<Float8>(from + 3 * leading);
  transpose_lanes(a, b, c, d);
  store_pair(to, to + 4 * stride, a);
  store_pair(to + stride, to + 5 * stride, b);
  store_pair(to + 2 * stride, to + 6 * stride, c);
  store_pair(to + 3 * stride, to + 7 * stride, d);
}
#define STELLA_FAST_TRANSPOSE 1
#endif

// Asks for the memory some lines ahead of a stream: the hardware's own prefetcher stops at every short column and page.
STELLA_INLINE void prefetch_ahead(const void* at, int64_t bytes) {
  constexpr int64_t kAhead = 1024;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(at) + kAhead + b);
}

// Rows [begin, begin + rows) of the view to columns of `panel`, `leading` apart, zeros up to `padded` rows.
template <typename T>
void pack(const MatrixView& view, int64_t begin, int64_t rows, int64_t padded, T* panel, int64_t leading, T scale) {
  with_storage(view, [&](auto* data) {
    const auto* from = data + begin * view.row_stride;
    if (view.row_stride == 1) {
      for (int64_t j = 0; j < view.r; ++j) {
        const auto* column = from + j * view.col_stride;
        T* to = panel + j * leading;
        if (j + 1 < view.r)  // the start of the next column, which the hardware does not foresee
          for (int64_t i = 0; i < rows && i < 256; i += 16) __builtin_prefetch(column + view.col_stride + i);
        for (int64_t i = 0; i < rows; ++i) to[i] = static_cast<T>(widen(column[i])) * scale;
      }
    } else {
      int64_t i = 0;
#ifdef STELLA_FAST_TRANSPOSE
      if constexpr (std::is_same_v<T, float> && std::is_same_v<decltype(data), float*>) {
        if (view.col_stride == 1 && scale == T(1)) {
          for (; i + kTransposeRows <= rows; i += kTransposeRows) {
            prefetch_ahead(from + i * view.row_stride, kTransposeRows * view.r * 4);
            int64_t j = 0;
            for (; j + 4 <= view.r; j += 4)
              transpose_in(from + i * view.row_stride + j, view.row_stride, panel + j * leading + i, leading);
            for (; j < view.r; ++j)
              for (int k = 0; k < kTransposeRows; ++k) panel[j * leading + i + k] = from[(i + k) * view.row_stride + j];
          }
        }
      }
#endif
      for (; i < rows; ++i)
        for (int64_t j = 0; j < view.r; ++j)
          panel[j * leading + i] = static_cast<T>(widen(from[i * view.row_stride + j * view.col_stride])) * scale;
    }
  });
  if (padded > rows)
    for (int64_t j = 0; j < view.r; ++j)
      for (int64_t i = rows; i < padded; ++i) panel[j * leading + i] = T(0);
}

template <typename T>
void unpack(const T* panel, int64_t leading, const MatrixView& view, int64_t begin, int64_t rows) {
  with_storage(view, [&](auto* data) {
    using S = std::remove_pointer_t<decltype(data)>;
    auto* to = data + begin * view.row_stride;
    if (view.row_stride == 1) {
      for (int64_t j = 0; j < view.r; ++j) {
        const T* column = panel + j * leading;
        S* out = to + j * view.col_stride;
        for (int64_t i = 0; i < rows; ++i) out[i] = Narrow<S>::from(column[i]);
      }
      return;
    }
    int64_t i = 0;
#ifdef STELLA_FAST_TRANSPOSE
    if constexpr (std::is_same_v<T, float> && std::is_same_v<decltype(data), float*>) {
      if (view.col_stride == 1) {
        for (; i + kTransposeRows <= rows; i += kTransposeRows) {
          int64_t j = 0;
          for (; j + 4 <= view.r; j += 4)
            transpose_out(panel + j * leading + i, leading, to + i * view.row_stride + j, view.row_stride);
          for (; j < view.r; ++j)
            for (int k = 0; k < kTransposeRows; ++k) to[(i + k) * view.row_stride + j] = panel[j * leading + i + k];
        }
      }
    }
#endif
    for (; i < rows; ++i)
      for (int64_t j = 0; j < view.r; ++j)
        to[i * view.row_stride + j * view.col_stride] = Narrow<S>::from(panel[j * leading + i]);
  });
}

}  // namespace stella::STELLA_ISA

// The largest magnitude of a matrix, and the power of two that brings it into range.
#pragma once

#include "common/inverse_square_root.h"
#include "common/panel.h"

namespace stella::STELLA_ISA {
namespace {

// Largest magnitude of the values as bits: integers, since a maximum of integers is vectorised and NaN is one of them.
template <typename Bits>
Bits largest_bits(const void* values, int64_t count, int64_t stride) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;
  const Bits* bits = static_cast<const Bits*>(values);
  Bits largest = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const Bits magnitude = bits[i] & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = bits[i * stride] & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <typename Bits>
Bits largest_bits_of(const MatrixView& view, int64_t begin, int64_t end) {
  const Bits* from = static_cast<const Bits*>(view.data) + begin * view.row_stride;
  const bool along_rows = view.row_stride == 1;
  const int64_t outer = along_rows ? view.r : end - begin, inner = along_rows ? end - begin : view.r;
  const int64_t outer_stride = along_rows ? view.col_stride : view.row_stride;
  const int64_t inner_stride = along_rows ? 1 : view.col_stride;
  if (inner_stride == 1 && outer_stride == inner) return largest_bits<Bits>(from, outer * inner, 1);
  Bits largest = 0;
  for (int64_t i = 0; i < outer; ++i) {
    const Bits some = largest_bits<Bits>(from + i * outer_stride, inner, inner_stride);
    largest = some > largest ? some : largest;
  }
  return largest;
}

// The magnitude with these bits of a dtype T; infinite for NaN as well.
template <typename T, typename Bits>
double magnitude_of(Bits bits) {
  T value;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&value, &bits, sizeof value);
  const double magnitude = static_cast<double>(widen(value));
  return is_finite(magnitude) ? magnitude : __builtin_inf();
}

// In rows [begin, end): infinite where a value is not finite.
double largest_magnitude(const MatrixView& view, int64_t begin, int64_t end) {
  switch (view.storage) {
    case Storage::float64:
      return magnitude_of<double>(largest_bits_of<uint64_t>(view, begin, end));
    case Storage::bfloat16:
      return magnitude_of<Bfloat16>(largest_bits_of<uint16_t>(view, begin, end));
    case Storage::float16:
      return magnitude_of<Float16>(largest_bits_of<uint16_t>(view, begin, end));
    default:
      return magnitude_of<float>(largest_bits_of<uint32_t>(view, begin, end));
  }
}

bool all_finite(const MatrixView& view) { return is_finite(largest_magnitude(view, 0, view.n)); }

// Whether `rows` rows of a panel of r columns stay finite when they are stored.
template <typename T>
bool fits(const T* panel, int64_t leading, int64_t rows, int64_t r, Storage storage) {
  Buffer own;
  const MatrixView there = {own.reserve<double>(rows * r), rows, r, r, 1, storage};
  unpack(panel, leading, there, 0, rows);
  return all_finite(there);
}

// A power of two that brings `largest` near one; two factors, since 2^-e alone can overflow for subnormals.
double power_of_two_scale(double largest) {
  int exponent = 0;
  __builtin_frexp(largest, &exponent);
  return __builtin_ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

}  // namespace
}  // namespace stella::STELLA_ISA

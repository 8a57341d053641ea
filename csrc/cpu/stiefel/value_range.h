// Whether a matrix is finite, and the power of two that brings it into range.
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
bool bits_finite(const MatrixView& view, int64_t begin, int64_t end, Bits infinity) {
  const Bits* from = static_cast<const Bits*>(view.data) + begin * view.row_stride;
  const bool along_rows = view.row_stride == 1;
  const int64_t outer = along_rows ? view.r : end - begin, inner = along_rows ? end - begin : view.r;
  const int64_t outer_stride = along_rows ? view.col_stride : view.row_stride;
  const int64_t inner_stride = along_rows ? 1 : view.col_stride;
  if (inner_stride == 1 && outer_stride == inner) return largest_bits<Bits>(from, outer * inner, 1) < infinity;
  for (int64_t i = 0; i < outer; ++i)
    if (largest_bits<Bits>(from + i * outer_stride, inner, inner_stride) >= infinity) return false;
  return true;
}

bool all_finite(const MatrixView& view, int64_t begin, int64_t end) {
  switch (view.storage) {
    case Storage::float64:
      return bits_finite<uint64_t>(view, begin, end, 0x7ff0000000000000ull);
    case Storage::bfloat16:
      return bits_finite<uint16_t>(view, begin, end, 0x7f80u);
    case Storage::float16:
      return bits_finite<uint16_t>(view, begin, end, 0x7c00u);
    default:
      return bits_finite<uint32_t>(view, begin, end, 0x7f800000u);
  }
}

double largest_magnitude(const MatrixView& view) {
  double largest = 0.0;
  with_storage(view, [&](auto* data) {
    for (int64_t i = 0; i < view.n; ++i)
      for (int64_t j = 0; j < view.r; ++j) {
        const double value = absolute(static_cast<double>(widen(data[i * view.row_stride + j * view.col_stride])));
        if (value > largest) largest = value;
      }
  });
  return largest;
}

// A power of two that brings `largest` near one; two factors, since 2^-e alone can overflow for subnormals.
double power_of_two_scale(double largest) {
  int exponent = 0;
  __builtin_frexp(largest, &exponent);
  return __builtin_ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

}  // namespace
}  // namespace stella::STELLA_ISA

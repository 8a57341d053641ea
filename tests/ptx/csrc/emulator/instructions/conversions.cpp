// cvt: between integers of every width, floats and the formats of 16 bits.
#include <cmath>
#include <limits>
#include <type_traits>

#include "formats.h"
#include "table.h"

namespace ptx {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
constexpr bool kInteger = std::is_integral_v<T>;

enum class To { kNearest, kZero, kDown, kUp };

// A value by its definition: exactly, in double, as which every float stands.
template <class T>
double value_of(uint64_t bits) {
  if constexpr (std::is_same_v<T, float>) return bits_as<float>(static_cast<uint32_t>(bits));
  if constexpr (std::is_same_v<T, double>) return bits_as<double>(bits);
  if constexpr (std::is_same_v<T, Bfloat16>) return from_bfloat16(static_cast<uint16_t>(bits));
  if constexpr (std::is_same_v<T, Half>) return from_half(static_cast<uint16_t>(bits));
  return 0.0;
}

template <class T>
uint64_t rounded_to_float(double value) {
  if constexpr (std::is_same_v<T, double>) return bits_as<uint64_t>(value);
  float narrow = static_cast<float>(value);
  if constexpr (std::is_same_v<T, float>) return bits_as<uint32_t>(narrow);
  // On the way to 16 bits to odd, so that what is rounded twice is as if it were once.
  if (std::isfinite(narrow) && static_cast<double>(narrow) != value) {
    if (std::fabs(static_cast<double>(narrow)) > std::fabs(value)) narrow = std::nextafter(narrow, 0.0f);
    narrow = bits_as<float>(bits_as<uint32_t>(narrow) | 1);
  }
  if constexpr (std::is_same_v<T, Bfloat16>) return to_bfloat16(narrow);
  if constexpr (std::is_same_v<T, Half>) return to_half(narrow);
  return 0;
}

// To the ends of the type's range where the value is past them, and of NaN to zero.
template <class T>
uint64_t rounded_to_integer(double value, To how) {
  if (std::isnan(value)) return 0;
  const double whole = how == To::kNearest ? std::nearbyint(value)
                       : how == To::kZero  ? std::trunc(value)
                       : how == To::kDown  ? std::floor(value)
                                           : std::ceil(value);
  if (whole <= static_cast<double>(std::numeric_limits<T>::min())) {
    return static_cast<std::make_unsigned_t<T>>(std::numeric_limits<T>::min());
  }
  if (whole >= static_cast<double>(std::numeric_limits<T>::max())) {
    return static_cast<std::make_unsigned_t<T>>(std::numeric_limits<T>::max());
  }
  return static_cast<std::make_unsigned_t<T>>(static_cast<T>(whole));
}

// Registers may be wider than the types: the upper bits are ignored, and of a result follow from its sign.
template <class D, class S, To kHow>
void convert(const Instruction& in, Warp& warp, uint32_t lanes) {
  each(lanes, [&](int i) {
    const uint64_t bits = warp.bits(in.operands[1], i);
    uint64_t made;
    if constexpr (kInteger<S> && kInteger<D>) {
      made = static_cast<uint64_t>(static_cast<D>(static_cast<S>(bits)));
    } else if constexpr (kInteger<S>) {
      const S value = static_cast<S>(bits);
      if constexpr (std::is_same_v<D, float>) {
        made = bits_as<uint32_t>(static_cast<float>(value));  // rounded once
      } else {
        made = rounded_to_float<D>(static_cast<double>(value));
      }
    } else if constexpr (kInteger<D>) {
      made = rounded_to_integer<D>(value_of<S>(bits), kHow);
    } else {
      made = rounded_to_float<D>(value_of<S>(bits));
    }
    warp.set_bits(in.operands[0], i, made);
  });
}

// A float to an integer that is a float.
template <class T, To kHow>
void round_in_place(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  each(lanes, [=](int i) {
    d[i] = kHow == To::kNearest ? std::nearbyint(a[i])
           : kHow == To::kZero  ? std::trunc(a[i])
           : kHow == To::kDown  ? std::floor(a[i])
                                : std::ceil(a[i]);
  });
}

// The first operand becomes the upper half.
template <uint16_t (*kFormat)(float)>
void pack(const Instruction& in, Warp& warp, uint32_t lanes) {
  uint32_t* d = warp.lanes<uint32_t>(in.operands[0]);
  const float* upper = warp.lanes<float>(in.operands[1]);
  const float* lower = warp.lanes<float>(in.operands[2]);
  each(lanes, [=](int i) { d[i] = static_cast<uint32_t>(kFormat(upper[i])) << 16 | kFormat(lower[i]); });
}

void convert_tf32(const Instruction& in, Warp& warp, uint32_t lanes) {
  uint32_t* d = warp.lanes<uint32_t>(in.operands[0]);
  const float* a = warp.lanes<float>(in.operands[1]);
  each(lanes, [=](int i) { d[i] = to_tf32(a[i]); });
}

template <class D, class S>
void add_integers_of(Table& table, const std::string& to, const std::string& from) {
  table["cvt." + to + "." + from] = {convert<D, S, To::kZero>, {kAny, kAny}};
}

template <class D>
void add_integers_to(Table& table, const std::string& to) {
  add_integers_of<D, int8_t>(table, to, "s8");
  add_integers_of<D, uint8_t>(table, to, "u8");
  add_integers_of<D, int16_t>(table, to, "s16");
  add_integers_of<D, uint16_t>(table, to, "u16");
  add_integers_of<D, int32_t>(table, to, "s32");
  add_integers_of<D, uint32_t>(table, to, "u32");
  add_integers_of<D, int64_t>(table, to, "s64");
  add_integers_of<D, uint64_t>(table, to, "u64");
}

template <class I, class F>
void add_between(Table& table, const std::string& integer, const std::string& real) {
  table["cvt.rn." + real + "." + integer] = {convert<F, I, To::kNearest>, {kWidth<F>, kAny}};
  table["cvt.rni." + integer + "." + real] = {convert<I, F, To::kNearest>, {kAny, kWidth<F>}};
  table["cvt.rzi." + integer + "." + real] = {convert<I, F, To::kZero>, {kAny, kWidth<F>}};
  table["cvt.rmi." + integer + "." + real] = {convert<I, F, To::kDown>, {kAny, kWidth<F>}};
  table["cvt.rpi." + integer + "." + real] = {convert<I, F, To::kUp>, {kAny, kWidth<F>}};
}

template <class F>
void add_real(Table& table, const std::string& real) {
  add_between<int32_t, F>(table, "s32", real);
  add_between<uint32_t, F>(table, "u32", real);
  add_between<int64_t, F>(table, "s64", real);
  add_between<uint64_t, F>(table, "u64", real);
  const std::string ends = "." + real + "." + real;
  table["cvt.rni" + ends] = {round_in_place<F, To::kNearest>, {kWidth<F>, kWidth<F>}};
  table["cvt.rzi" + ends] = {round_in_place<F, To::kZero>, {kWidth<F>, kWidth<F>}};
  table["cvt.rmi" + ends] = {round_in_place<F, To::kDown>, {kWidth<F>, kWidth<F>}};
  table["cvt.rpi" + ends] = {round_in_place<F, To::kUp>, {kWidth<F>, kWidth<F>}};
}

}  // namespace

void add_conversions(Table& table) {
  add_integers_to<int8_t>(table, "s8");
  add_integers_to<uint8_t>(table, "u8");
  add_integers_to<int16_t>(table, "s16");
  add_integers_to<uint16_t>(table, "u16");
  add_integers_to<int32_t>(table, "s32");
  add_integers_to<uint32_t>(table, "u32");
  add_integers_to<int64_t>(table, "s64");
  add_integers_to<uint64_t>(table, "u64");
  add_real<float>(table, "f32");
  add_real<double>(table, "f64");
  table["cvt.f64.f32"] = {convert<double, float, To::kNearest>, {8, 4}};
  table["cvt.rn.f32.f64"] = {convert<float, double, To::kNearest>, {4, 8}};
  table["cvt.f32.bf16"] = {convert<float, Bfloat16, To::kNearest>, {4, 2}};
  table["cvt.f32.f16"] = {convert<float, Half, To::kNearest>, {4, 2}};
  table["cvt.f64.bf16"] = {convert<double, Bfloat16, To::kNearest>, {8, 2}};
  table["cvt.f64.f16"] = {convert<double, Half, To::kNearest>, {8, 2}};
  table["cvt.rn.bf16.f64"] = {convert<Bfloat16, double, To::kNearest>, {2, 8}};
  table["cvt.rn.f16.f64"] = {convert<Half, double, To::kNearest>, {2, 8}};
  table["cvt.rn.bf16.f32"] = {convert<Bfloat16, float, To::kNearest>, {2, 4}};
  table["cvt.rn.f16.f32"] = {convert<Half, float, To::kNearest>, {2, 4}};
  table["cvt.rn.bf16x2.f32"] = {pack<to_bfloat16>, {4, 4, 4}};
  table["cvt.rn.f16x2.f32"] = {pack<to_half>, {4, 4, 4}};
  table["cvt.rna.tf32.f32"] = {convert_tf32, {4, 4}};
}

}  // namespace ptx

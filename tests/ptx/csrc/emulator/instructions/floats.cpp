// Floating-point arithmetic, and the functions that PTX approximates.
#include <cmath>
#include <cstdlib>

#include "formats.h"
#include "table.h"

namespace ptx {
namespace {

template <class T>
T flushed(T value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(T(0), value) : value;
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return -a;
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
struct AbsoluteFlushed {
  template <class T>
  T operator()(T a) const {
    return flushed(std::fabs(a));
  }
};
// Of a number and a NaN the number.
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    if (a == b) return std::signbit(a) ? a : b;  // -0 is less than +0
    return std::isnan(a) ? b : std::isnan(b) || a < b ? a : b;
  }
};
struct Most {
  template <class T>
  T operator()(T a, T b) const {
    if (a == b) return std::signbit(a) ? b : a;
    return std::isnan(a) ? b : std::isnan(b) || a > b ? a : b;
  }
};
struct LeastOrNaN {
  template <class T>
  T operator()(T a, T b) const {
    return std::isnan(a) || std::isnan(b) ? T(NAN) : Least()(a, b);
  }
};
struct MostOrNaN {
  template <class T>
  T operator()(T a, T b) const {
    return std::isnan(a) || std::isnan(b) ? T(NAN) : Most()(a, b);
  }
};
template <class F>
struct OfThree {
  template <class T>
  T operator()(T a, T b, T c) const {
    return F()(F()(a, b), c);
  }
};
// The sign of the first and the magnitude of the second operand.
struct CopySign {
  template <class T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};
struct Root {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return T(1) / a;
  }
};

// Two floats in one register of 64 bits.
template <class F>
struct OfPairs {
  uint64_t operator()(uint64_t a, uint64_t b, uint64_t c = 0) const {
    uint64_t made = 0;
    for (int shift : {0, 32}) {
      const float x = bits_as<float>(static_cast<uint32_t>(a >> shift));
      const float y = bits_as<float>(static_cast<uint32_t>(b >> shift));
      float z = bits_as<float>(static_cast<uint32_t>(c >> shift));
      if constexpr (std::is_same_v<F, MultiplyAdd>) {
        z = F()(x, y, z);
      } else {
        z = F()(x, y);
      }
      made |= static_cast<uint64_t>(bits_as<uint32_t>(z)) << shift;
    }
    return made;
  }
};

// A random number that is the same for the same result: an approximation is one function of its operands, in every warp
// that computes it.
uint32_t drawn(double exact, const Launch& launch) {
  return Chance(bits_as<uint64_t>(exact) ^ launch.noise).below(1u << 30);
}

// Some float no further than `ulps` units in the last place from the exact value: the nearest where nothing is unkind.
float within(double exact, int ulps, const Launch& launch) {
  const float nearest = static_cast<float>(exact);
  if (!launch.unkind(kNoise) || !std::isfinite(nearest) || nearest == 0.0f) return nearest;
  const int step = static_cast<int>(drawn(exact, launch) % (2 * static_cast<uint32_t>(ulps) + 1)) - ulps;
  float moved = nearest;
  for (int i = 0; i < std::abs(step); ++i) moved = std::nextafter(moved, step > 0 ? INFINITY : -INFINITY);
  const double unit = std::ldexp(1.0, std::max(std::ilogb(exact), -126) - 23);
  if (std::fabs(moved - exact) > ulps * unit) moved = std::nextafter(moved, nearest);
  return moved;
}

// What PTX ISA says of each: the furthest that a result may be off, in units in the last place.
struct ApproximateReciprocal {
  static constexpr int kUlps = 1;
  double operator()(double a) const { return 1.0 / a; }
};
struct ApproximateRoot {
  static constexpr int kUlps = 1;
  double operator()(double a) const { return std::sqrt(a); }
};
struct ApproximateReciprocalRoot {
  static constexpr int kUlps = 2;
  double operator()(double a) const { return 1.0 / std::sqrt(a); }
};
struct ApproximatePower {
  static constexpr int kUlps = 2;
  double operator()(double a) const { return std::exp2(a); }
};

template <class F, bool kFlush>
void approximate(const Instruction& in, Warp& warp, uint32_t lanes) {
  float* d = warp.lanes<float>(in.operands[0]);
  const float* a = warp.lanes<float>(in.operands[1]);
  each(lanes, [&](int i) {
    const float value = within(F()(kFlush ? flushed(a[i]) : a[i]), F::kUlps, warp.block.launch);
    d[i] = kFlush ? flushed(value) : value;
  });
}

// Off by 2^-22.6 where the argument is in (0.5, 2), elsewhere by as much of the result.
template <bool kFlush>
void logarithm(const Instruction& in, Warp& warp, uint32_t lanes) {
  float* d = warp.lanes<float>(in.operands[0]);
  const float* a = warp.lanes<float>(in.operands[1]);
  const Launch& launch = warp.block.launch;
  each(lanes, [&](int i) {
    const double exact = std::log2(static_cast<double>(kFlush ? flushed(a[i]) : a[i]));
    const double most = std::exp2(-22.6) * (a[i] > 0.5f && a[i] < 2.0f ? 1.0 : std::fabs(exact));
    const double share = launch.unkind(kNoise) ? drawn(exact, launch) % 2001 / 1000.0 - 1.0 : 0.0;
    d[i] = static_cast<float>(std::isfinite(exact) ? exact + share * most : exact);
  });
}

template <bool kFlush>
void divide_full(const Instruction& in, Warp& warp, uint32_t lanes) {
  float* d = warp.lanes<float>(in.operands[0]);
  const float* a = warp.lanes<float>(in.operands[1]);
  const float* b = warp.lanes<float>(in.operands[2]);
  each(lanes, [&](int i) {
    const double x = kFlush ? flushed(a[i]) : a[i], y = kFlush ? flushed(b[i]) : b[i];
    const float value = within(x / y, 2, warp.block.launch);
    d[i] = kFlush ? flushed(value) : value;
  });
}

// Of the upper words alone: a start for Newton's iteration, the lower word of which is zero.
void gross_reciprocal(const Instruction& in, Warp& warp, uint32_t lanes) {
  double* d = warp.lanes<double>(in.operands[0]);
  const double* a = warp.lanes<double>(in.operands[1]);
  each(lanes, [=](int i) {
    const double upper = flushed(bits_as<double>(bits_as<uint64_t>(a[i]) >> 32 << 32));
    d[i] = flushed(bits_as<double>(bits_as<uint64_t>(1.0 / upper) >> 32 << 32));
  });
}

template <class T>
void add_type(Table& table, const std::string& type) {
  for (const char* rounding : {"", "rn."}) {
    add_binary<T, Add>(table, std::string("add.") + rounding + type);
    add_binary<T, Subtract>(table, std::string("sub.") + rounding + type);
    add_binary<T, Multiply>(table, std::string("mul.") + rounding + type);
  }
  add_binary<T, Divide>(table, "div.rn." + type);
  add_ternary<T, MultiplyAdd>(table, "fma.rn." + type);
  add_unary<T, Root>(table, "sqrt.rn." + type);
  add_unary<T, Reciprocal>(table, "rcp.rn." + type);
  add_unary<T, Negate>(table, "neg." + type);
  add_unary<T, Absolute>(table, "abs." + type);
  add_binary<T, Least>(table, "min." + type);
  add_binary<T, Most>(table, "max." + type);
  add_binary<T, CopySign>(table, "copysign." + type);
}

template <class F>
void add_approximate(Table& table, const std::string& name) {
  table[name + ".approx.f32"] = {approximate<F, false>, {4, 4}};
  table[name + ".approx.ftz.f32"] = {approximate<F, true>, {4, 4}};
}

}  // namespace

void add_floats(Table& table) {
  add_type<float>(table, "f32");
  add_type<double>(table, "f64");
  add_unary<float, AbsoluteFlushed>(table, "abs.ftz.f32");
  add_binary<float, LeastOrNaN>(table, "min.NaN.f32");
  add_binary<float, MostOrNaN>(table, "max.NaN.f32");
  add_ternary<float, OfThree<Least>>(table, "min.f32(3)");
  add_ternary<float, OfThree<Most>>(table, "max.f32(3)");
  add_ternary<float, OfThree<LeastOrNaN>>(table, "min.NaN.f32(3)");
  add_ternary<float, OfThree<MostOrNaN>>(table, "max.NaN.f32(3)");
  for (const char* rounding : {"", "rn."}) {
    add_binary<uint64_t, OfPairs<Add>>(table, std::string("add.") + rounding + "f32x2");
    add_binary<uint64_t, OfPairs<Subtract>>(table, std::string("sub.") + rounding + "f32x2");
    add_binary<uint64_t, OfPairs<Multiply>>(table, std::string("mul.") + rounding + "f32x2");
  }
  add_ternary<uint64_t, OfPairs<MultiplyAdd>>(table, "fma.rn.f32x2");
  add_approximate<ApproximateReciprocal>(table, "rcp");
  add_approximate<ApproximateRoot>(table, "sqrt");
  add_approximate<ApproximateReciprocalRoot>(table, "rsqrt");
  add_approximate<ApproximatePower>(table, "ex2");
  table["lg2.approx.f32"] = {logarithm<false>, {4, 4}};
  table["lg2.approx.ftz.f32"] = {logarithm<true>, {4, 4}};
  table["div.full.f32"] = {divide_full<false>, {4, 4, 4}};
  table["div.full.ftz.f32"] = {divide_full<true>, {4, 4, 4}};
  table["rcp.approx.ftz.f64"] = {gross_reciprocal, {8, 8}};
}

}  // namespace ptx

// Integer arithmetic, selections and comparisons. Signed sums wrap around, and are computed unsigned.
#include <algorithm>
#include <type_traits>

#include "table.h"

namespace ptx {
namespace {

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a + b);
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a - b);
  }
};
struct MultiplyLow {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    using Wide =
        std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                           std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
  }
};
struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return static_cast<T>(a * b + c);
  }
};
// Of a division by zero the result is not specified: all ones here, as the hardware gives.
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T(0));
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(T(0) - a);
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T(0));
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Most {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(T(0) - a);
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return a >> (8 * sizeof(T) - 1) ? static_cast<T>(T(0) - a) : a;
  }
};

template <class Narrow, class Wide>
void multiply_wide(const Instruction& in, Warp& warp, uint32_t lanes) {
  Wide* d = warp.lanes<Wide>(in.operands[0]);
  const Narrow* a = warp.lanes<Narrow>(in.operands[1]);
  const Narrow* b = warp.lanes<Narrow>(in.operands[2]);
  each(lanes, [=](int i) { d[i] = static_cast<Wide>(a[i]) * static_cast<Wide>(b[i]); });
}

template <class Narrow, class Wide>
void multiply_wide_add(const Instruction& in, Warp& warp, uint32_t lanes) {
  using Unsigned = std::make_unsigned_t<Wide>;
  Unsigned* d = warp.lanes<Unsigned>(in.operands[0]);
  const Narrow* a = warp.lanes<Narrow>(in.operands[1]);
  const Narrow* b = warp.lanes<Narrow>(in.operands[2]);
  const Unsigned* c = warp.lanes<Unsigned>(in.operands[3]);
  each(lanes, [=](int i) { d[i] = static_cast<Unsigned>(static_cast<Wide>(a[i]) * static_cast<Wide>(b[i])) + c[i]; });
}

// A field of `length` bits from `position` on, filled with its highest bit where signed (PTX's definition of bfe).
template <class T>
void extract_field(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  const uint32_t* position = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* length = warp.lanes<uint32_t>(in.operands[3]);
  constexpr int kBits = 8 * sizeof(T);
  each(lanes, [=](int i) {
    using Unsigned = std::make_unsigned_t<T>;
    const int from = position[i] & 0xff, count = length[i] & 0xff;
    const Unsigned whole = static_cast<Unsigned>(a[i]);
    const int last = std::min(from + count - 1, kBits - 1);
    const bool fill = std::is_signed_v<T> && count > 0 && (whole >> last & 1);
    Unsigned field = 0;
    for (int bit = 0; bit < kBits; ++bit) {
      const bool set = bit < count && from + bit < kBits ? (whole >> (from + bit) & 1) != 0 : fill;
      field |= static_cast<Unsigned>(set) << bit;
    }
    d[i] = static_cast<T>(field);
  });
}

template <class T, class Test>
void compare(const Instruction& in, Warp& warp, uint32_t lanes) {
  const T* a = warp.lanes<T>(in.operands[1]);
  const T* b = warp.lanes<T>(in.operands[2]);
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= static_cast<uint32_t>(Test()(a[i], b[i])) << i;
  if (in.operands.size() == 4) {  // setp.<comparison>.and or .or
    const uint32_t other = warp.holds(in.operands[3]);
    found = in.modifiers[2] == "and" ? found & other : found | other;
  }
  uint32_t& d = warp.predicate(in.operands[0]);
  d = (d & ~lanes) | (found & lanes);
}

template <class T, class Test>
void add_comparison(Table& table, const std::string& name, const std::string& type) {
  table["setp." + name + "." + type] = {compare<T, Test>, {kPredicate, kWidth<T>, kWidth<T>}};
  for (const char* with : {"and", "or"}) {
    table["setp." + name + "." + with + "." + type] = {compare<T, Test>,
                                                       {kPredicate, kWidth<T>, kWidth<T>, kPredicate}};
  }
}

struct Equal {
  template <class T>
  bool operator()(T a, T b) const {
    return a == b;
  }
};
struct Unequal {  // of floats where neither is NaN
  template <class T>
  bool operator()(T a, T b) const {
    return a < b || a > b;
  }
};
struct Less {
  template <class T>
  bool operator()(T a, T b) const {
    return a < b;
  }
};
struct LessEqual {
  template <class T>
  bool operator()(T a, T b) const {
    return a <= b;
  }
};
struct Greater {
  template <class T>
  bool operator()(T a, T b) const {
    return a > b;
  }
};
struct GreaterEqual {
  template <class T>
  bool operator()(T a, T b) const {
    return a >= b;
  }
};
struct Ordered {
  template <class T>
  bool operator()(T a, T b) const {
    return a == a && b == b;
  }
};
template <class Test>
struct Not {
  template <class T>
  bool operator()(T a, T b) const {
    return !Test()(a, b);
  }
};

template <class T>
void add_orders(Table& table, const std::string& type) {
  add_comparison<T, Less>(table, "lt", type);
  add_comparison<T, LessEqual>(table, "le", type);
  add_comparison<T, Greater>(table, "gt", type);
  add_comparison<T, GreaterEqual>(table, "ge", type);
}

template <class T>
void add_equalities(Table& table, const std::string& type) {
  add_comparison<T, Equal>(table, "eq", type);
  add_comparison<T, Unequal>(table, "ne", type);
}

template <class T>
void add_float_comparisons(Table& table, const std::string& type) {
  add_orders<T>(table, type);
  add_equalities<T>(table, type);
  add_comparison<T, Not<Unequal>>(table, "equ", type);
  add_comparison<T, Not<Equal>>(table, "neu", type);
  add_comparison<T, Not<GreaterEqual>>(table, "ltu", type);
  add_comparison<T, Not<Greater>>(table, "leu", type);
  add_comparison<T, Not<LessEqual>>(table, "gtu", type);
  add_comparison<T, Not<Less>>(table, "geu", type);
  add_comparison<T, Ordered>(table, "num", type);
  add_comparison<T, Not<Ordered>>(table, "nan", type);
}

template <class Signed, class Unsigned>
void add_width(Table& table, const std::string& bits) {
  for (const char* sign : {"s", "u"}) {
    add_binary<Unsigned, Add>(table, "add." + (sign + bits));
    add_binary<Unsigned, Subtract>(table, "sub." + (sign + bits));
    add_binary<Unsigned, MultiplyLow>(table, "mul.lo." + (sign + bits));
  }
  add_unary<Unsigned, Negate>(table, "neg.s" + bits);
  add_unary<Unsigned, Absolute>(table, "abs.s" + bits);
  add_binary<Signed, Least>(table, "min.s" + bits);
  add_binary<Signed, Most>(table, "max.s" + bits);
  add_binary<Unsigned, Least>(table, "min.u" + bits);
  add_binary<Unsigned, Most>(table, "max.u" + bits);
  add_binary<Signed, Divide>(table, "div.s" + bits);
  add_binary<Unsigned, Divide>(table, "div.u" + bits);
  add_binary<Signed, Remainder>(table, "rem.s" + bits);
  add_binary<Unsigned, Remainder>(table, "rem.u" + bits);
  add_equalities<Unsigned>(table, "b" + bits);
  add_equalities<Unsigned>(table, "s" + bits);
  add_equalities<Unsigned>(table, "u" + bits);
  add_orders<Signed>(table, "s" + bits);
  add_orders<Unsigned>(table, "u" + bits);
}

template <class Signed, class Unsigned>
void add_wide_width(Table& table, const std::string& bits) {
  for (const char* sign : {"s", "u"}) add_ternary<Unsigned, MultiplyAdd>(table, "mad.lo." + (sign + bits));
  add_binary<Signed, MultiplyHigh>(table, "mul.hi.s" + bits);
  add_binary<Unsigned, MultiplyHigh>(table, "mul.hi.u" + bits);
  table["bfe.s" + bits] = {extract_field<Signed>, {kWidth<Signed>, kWidth<Signed>, 4, 4}};
  table["bfe.u" + bits] = {extract_field<Unsigned>, {kWidth<Signed>, kWidth<Signed>, 4, 4}};
}

}  // namespace

void add_integers(Table& table) {
  add_width<int16_t, uint16_t>(table, "16");
  add_width<int32_t, uint32_t>(table, "32");
  add_width<int64_t, uint64_t>(table, "64");
  add_wide_width<int32_t, uint32_t>(table, "32");
  add_wide_width<int64_t, uint64_t>(table, "64");
  table["mul.wide.s16"] = {multiply_wide<int16_t, int32_t>, {4, 2, 2}};
  table["mul.wide.u16"] = {multiply_wide<uint16_t, uint32_t>, {4, 2, 2}};
  table["mul.wide.s32"] = {multiply_wide<int32_t, int64_t>, {8, 4, 4}};
  table["mul.wide.u32"] = {multiply_wide<uint32_t, uint64_t>, {8, 4, 4}};
  table["mad.wide.s32"] = {multiply_wide_add<int32_t, int64_t>, {8, 4, 4, 8}};
  table["mad.wide.u32"] = {multiply_wide_add<uint32_t, uint64_t>, {8, 4, 4, 8}};
  add_float_comparisons<float>(table, "f32");
  add_float_comparisons<double>(table, "f64");
}

}  // namespace ptx

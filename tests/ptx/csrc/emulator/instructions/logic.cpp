// Bits: logic, shifts, moves, selections.
#include <algorithm>
#include <type_traits>

#include "table.h"

namespace ptx {
namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct ExclusiveOr {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Complement {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};

template <class F>
void of_predicates(const Instruction& in, Warp& warp, uint32_t lanes) {
  const uint32_t found = F()(warp.holds(in.operands[1]), warp.holds(in.operands[2]));
  uint32_t& d = warp.predicate(in.operands[0]);
  d = (d & ~lanes) | (found & lanes);
}

template <bool kComplement>
void of_predicate(const Instruction& in, Warp& warp, uint32_t lanes) {
  const uint32_t found = kComplement ? ~warp.holds(in.operands[1]) : warp.holds(in.operands[1]);
  uint32_t& d = warp.predicate(in.operands[0]);
  d = (d & ~lanes) | (found & lanes);
}

// By an unsigned number of bits, and past the width by the width.
template <class T>
void shift_left(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  const uint32_t* by = warp.lanes<uint32_t>(in.operands[2]);
  each(lanes, [=](int i) { d[i] = by[i] < 8 * sizeof(T) ? static_cast<T>(a[i] << by[i]) : T(0); });
}

template <class T>
void shift_right(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  const uint32_t* by = warp.lanes<uint32_t>(in.operands[2]);
  each(lanes, [=](int i) {
    const T past = std::is_signed_v<T> && a[i] < 0 ? static_cast<T>(-1) : T(0);
    d[i] = by[i] < 8 * sizeof(T) ? static_cast<T>(a[i] >> by[i]) : past;
  });
}

// Bits of two words side by side, shifted; past 32 by 32 (clamp) or by the rest (wrap).
template <bool kLeft, bool kWrap>
void funnel(const Instruction& in, Warp& warp, uint32_t lanes) {
  uint32_t* d = warp.lanes<uint32_t>(in.operands[0]);
  const uint32_t* low = warp.lanes<uint32_t>(in.operands[1]);
  const uint32_t* high = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* by = warp.lanes<uint32_t>(in.operands[3]);
  each(lanes, [=](int i) {
    const uint32_t n = kWrap ? by[i] & 31 : std::min(by[i], 32u);
    const uint64_t both = static_cast<uint64_t>(high[i]) << 32 | low[i];
    d[i] = static_cast<uint32_t>(kLeft ? both << n >> 32 : both >> n);
  });
}

// Bytes of two words by four selectors; a selector's fourth bit asks for the byte's sign in all of its bits.
void permute(const Instruction& in, Warp& warp, uint32_t lanes) {
  uint32_t* d = warp.lanes<uint32_t>(in.operands[0]);
  const uint32_t* a = warp.lanes<uint32_t>(in.operands[1]);
  const uint32_t* b = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* selectors = warp.lanes<uint32_t>(in.operands[3]);
  each(lanes, [=](int i) {
    const uint64_t both = static_cast<uint64_t>(b[i]) << 32 | a[i];
    uint32_t made = 0;
    for (int at = 0; at < 4; ++at) {
      const uint32_t selector = selectors[i] >> (4 * at) & 15;
      uint32_t byte = both >> (8 * (selector & 7)) & 0xff;
      if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
      made |= byte << (8 * at);
    }
    d[i] = made;
  });
}

template <class T>
void leading_zeros(const Instruction& in, Warp& warp, uint32_t lanes) {
  uint32_t* d = warp.lanes<uint32_t>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  each(lanes, [=](int i) {
    uint32_t count = 0;
    while (count < 8 * sizeof(T) && !(a[i] >> (8 * sizeof(T) - 1 - count) & 1)) ++count;
    d[i] = count;
  });
}

template <class T>
void set_bits_of(const Instruction& in, Warp& warp, uint32_t lanes) {
  uint32_t* d = warp.lanes<uint32_t>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  each(lanes, [=](int i) { d[i] = static_cast<uint32_t>(__builtin_popcountll(a[i])); });
}

template <class T>
void select(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  const T* b = warp.lanes<T>(in.operands[2]);
  const uint32_t first = warp.holds(in.operands[3]);
  each(lanes, [=](int i) { d[i] = first >> i & 1 ? a[i] : b[i]; });
}

// A register, or several that are packed into one or unpacked from it, the lowest bits first.
template <class T>
void move(const Instruction& in, Warp& warp, uint32_t lanes) {
  const Operand& to = in.operands[0];
  const Operand& from = in.operands[1];
  const auto width = [&in](const Operand& list) { return static_cast<int>(8 * sizeof(T) / list.list.size()); };
  if (from.kind == Operand::Kind::kList) {
    const int bits = width(from);
    each(lanes, [&](int i) {
      uint64_t whole = 0;
      for (size_t at = 0; at < from.list.size(); ++at) {
        const uint64_t part = warp.bits(from.list[at], i) & ((uint64_t(1) << bits) - 1);
        whole |= part << (bits * at);
      }
      warp.set_bits(to, i, whole);
    });
  } else if (to.kind == Operand::Kind::kList) {
    const int bits = width(to);
    each(lanes, [&](int i) {
      const uint64_t whole = warp.bits(from, i);
      for (size_t at = 0; at < to.list.size(); ++at) {
        if (to.list[at].kind == Operand::Kind::kNothing) continue;
        warp.set_bits(to.list[at], i, whole >> (bits * at) & ((uint64_t(1) << bits) - 1));
      }
    });
  } else {
    if (to.width != kWidth<T> || (from.kind == Operand::Kind::kRegister && from.width != kWidth<T>)) {
      in.fault("registers of another width");
    }
    T* d = warp.lanes<T>(to);
    const T* a = warp.lanes<T>(from);
    each(lanes, [=](int i) { d[i] = a[i]; });
  }
}

template <class Signed, class Unsigned>
void add_width(Table& table, const std::string& bits) {
  constexpr int kBytes = kWidth<Unsigned>;
  add_binary<Unsigned, And>(table, "and.b" + bits);
  add_binary<Unsigned, Or>(table, "or.b" + bits);
  add_binary<Unsigned, ExclusiveOr>(table, "xor.b" + bits);
  add_unary<Unsigned, Complement>(table, "not.b" + bits);
  table["shl.b" + bits] = {shift_left<Unsigned>, {kBytes, kBytes, 4}};
  table["shr.b" + bits] = {shift_right<Unsigned>, {kBytes, kBytes, 4}};
  table["shr.u" + bits] = {shift_right<Unsigned>, {kBytes, kBytes, 4}};
  table["shr.s" + bits] = {shift_right<Signed>, {kBytes, kBytes, 4}};
  for (const char* type : {"b", "u", "s", "f"}) {
    if (*type == 'f' && kBytes == 2) continue;
    table["selp." + (type + bits)] = {select<Unsigned>, {kBytes, kBytes, kBytes, kPredicate}};
    table["mov." + (type + bits)] = {move<Unsigned>, {kAny, kAny}};
  }
}

}  // namespace

void add_logic(Table& table) {
  add_width<int16_t, uint16_t>(table, "16");
  add_width<int32_t, uint32_t>(table, "32");
  add_width<int64_t, uint64_t>(table, "64");
  table["and.pred"] = {of_predicates<And>, {kPredicate, kPredicate, kPredicate}};
  table["or.pred"] = {of_predicates<Or>, {kPredicate, kPredicate, kPredicate}};
  table["xor.pred"] = {of_predicates<ExclusiveOr>, {kPredicate, kPredicate, kPredicate}};
  table["not.pred"] = {of_predicate<true>, {kPredicate, kPredicate}};
  table["mov.pred"] = {of_predicate<false>, {kPredicate, kPredicate}};
  table["shf.l.wrap.b32"] = {funnel<true, true>, {4, 4, 4, 4}};
  table["shf.l.clamp.b32"] = {funnel<true, false>, {4, 4, 4, 4}};
  table["shf.r.wrap.b32"] = {funnel<false, true>, {4, 4, 4, 4}};
  table["shf.r.clamp.b32"] = {funnel<false, false>, {4, 4, 4, 4}};
  table["prmt.b32"] = {permute, {4, 4, 4, 4}};
  table["clz.b32"] = {leading_zeros<uint32_t>, {4, 4}};
  table["clz.b64"] = {leading_zeros<uint64_t>, {4, 8}};
  table["popc.b32"] = {set_bits_of<uint32_t>, {4, 4}};
  table["popc.b64"] = {set_bits_of<uint64_t>, {4, 8}};
}

}  // namespace ptx

// Instructions by their whole opcode: `add.rn.f32` is known or is not, no modifier is passed over.
#pragma once

#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "../block.h"

namespace ptx {

// Widths of operands as written in the table: bytes of lanes, or one of these.
constexpr int kPredicate = 1;
constexpr int kAny = 0;  // the handler looks at the operand itself

struct Entry {
  Handler run;
  std::vector<int> widths;
};

using Table = std::unordered_map<std::string, Entry>;

void add_integers(Table&);
void add_logic(Table&);
void add_floats(Table&);
void add_conversions(Table&);
void add_warp_wide(Table&);

// Loads, stores, atomics and asynchronous copies, whose modifiers are too many to list; false where it is none.
bool bind_access(Instruction&, Program&);

const Table& table();

template <class T, class F>
void unary(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  each(lanes, [=](int i) { d[i] = F()(a[i]); });
}

template <class T, class F>
void binary(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  const T* b = warp.lanes<T>(in.operands[2]);
  each(lanes, [=](int i) { d[i] = F()(a[i], b[i]); });
}

template <class T, class F>
void ternary(const Instruction& in, Warp& warp, uint32_t lanes) {
  T* d = warp.lanes<T>(in.operands[0]);
  const T* a = warp.lanes<T>(in.operands[1]);
  const T* b = warp.lanes<T>(in.operands[2]);
  const T* c = warp.lanes<T>(in.operands[3]);
  each(lanes, [=](int i) { d[i] = F()(a[i], b[i], c[i]); });
}

template <class T>
constexpr int kWidth = sizeof(T);

template <class T, class F>
void add_unary(Table& table, const std::string& opcode) {
  table[opcode] = {unary<T, F>, {kWidth<T>, kWidth<T>}};
}

template <class T, class F>
void add_binary(Table& table, const std::string& opcode) {
  table[opcode] = {binary<T, F>, {kWidth<T>, kWidth<T>, kWidth<T>}};
}

template <class T, class F>
void add_ternary(Table& table, const std::string& opcode) {
  table[opcode] = {ternary<T, F>, {kWidth<T>, kWidth<T>, kWidth<T>, kWidth<T>}};
}

}  // namespace ptx

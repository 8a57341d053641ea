// Loads, stores, atomics, asynchronous copies. Every modifier is checked; those about caches change nothing.
#include <algorithm>
#include <cstring>

#include "table.h"

namespace ptx {
namespace {

struct Access {
  enum class Space { kNone, kGlobal, kShared, kParameter };
  Space space = Space::kNone;
  int count = 1;  // elements of a lane
  int bytes = 0;  // of an element
  bool sign = false;
};

Access decoded(const Instruction& in) {
  Access access;
  for (size_t i = 1; i < in.modifiers.size(); ++i) {
    const std::string& word = in.modifiers[i];
    if (word == "global") {
      access.space = Access::Space::kGlobal;
    } else if (word == "shared" || word == "shared::cta") {
      access.space = Access::Space::kShared;
    } else if (word == "param") {
      access.space = Access::Space::kParameter;
    } else if (word == "v2" || word == "v4" || word == "v8") {
      access.count = word[1] - '0';
    } else if (i + 1 == in.modifiers.size() && word.size() >= 2 && std::strchr("busf", word[0])) {
      access.bytes = std::atoi(word.c_str() + 1) / 8;
      access.sign = word[0] == 's';
    } else if (word != "nc" && word != "ca" && word != "cg" && word.rfind("L1::", 0) != 0) {
      in.fault("a modifier that is not known, " + word);
    }
  }
  if (access.space == Access::Space::kNone || access.bytes < 1 || access.bytes > 8) in.fault("an access not known");
  return access;
}

const Operand& element(const Operand& operand, int which) {
  return operand.kind == Operand::Kind::kList ? operand.list[static_cast<size_t>(which)] : operand;
}

uint64_t extended(uint64_t bits, int bytes) {
  const int spare = 64 - 8 * bytes;
  return static_cast<uint64_t>(static_cast<int64_t>(bits << spare) >> spare);
}

void load_parameter(const Instruction& in, Warp& warp, uint32_t lanes) {
  uint64_t bits = 0;
  const int bytes = decoded(in).bytes;
  const Launch& launch = warp.block.launch;
  std::memcpy(&bits, launch.parameters.data() + in.operands[1].displacement, static_cast<size_t>(bytes));
  if (in.sign) bits = extended(bits, bytes);
  each(lanes, [&](int i) { warp.set_bits(element(in.operands[0], 0), i, bits); });
}

// Elements of a lane from where they lie side by side to registers, and back.
template <int kBytes>
void scatter(const Warp& warp, const Instruction& in, int lane, const uint8_t* from) {
  for (int which = 0; which < in.elements; ++which) {
    const Operand& to = element(in.operands[0], which);
    if (to.kind == Operand::Kind::kNothing) continue;
    if (to.width == kBytes) {
      std::memcpy(warp.file + to.place + kBytes * lane, from + kBytes * which, kBytes);
    } else {
      uint64_t bits = 0;
      std::memcpy(&bits, from + kBytes * which, kBytes);
      warp.set_bits(to, lane, in.sign ? extended(bits, kBytes) : bits);
    }
  }
}

template <bool kShared, int kBytes>
void load(const Instruction& in, Warp& warp, uint32_t lanes) {
  const uint32_t bytes = static_cast<uint32_t>(kBytes * in.elements);
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    uint8_t data[64];
    const uint64_t address = warp.address(in.operands[1], lane);
    if (kShared) {
      warp.block.read_shared(in, warp, address, bytes, data);
    } else {
      warp.block.read_global(in, warp, address, bytes, data);
    }
    scatter<kBytes>(warp, in, lane, data);
  }
}

template <bool kShared, int kBytes>
void store(const Instruction& in, Warp& warp, uint32_t lanes) {
  const uint32_t bytes = static_cast<uint32_t>(kBytes * in.elements);
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    uint8_t data[64];
    for (int which = 0; which < in.elements; ++which) {
      const uint64_t bits = warp.bits(element(in.operands[1], which), lane);
      std::memcpy(data + kBytes * which, &bits, kBytes);
    }
    const uint64_t address = warp.address(in.operands[0], lane);
    if (kShared) {
      warp.block.write_shared(in, warp, address, bytes, data);
    } else {
      warp.block.write_global(in, warp, address, bytes, data);
    }
  }
}

template <uint32_t (*kChange)(uint32_t, uint32_t), bool kReturns>
void atomic(const Instruction& in, Warp& warp, uint32_t lanes) {
  const size_t at = kReturns ? 1 : 0;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const uint32_t with = static_cast<uint32_t>(warp.bits(in.operands[at + 1], lane));
    const uint64_t address = warp.address(in.operands[at], lane);
    const uint32_t before = warp.block.update_global(in, warp, address, kChange, with);
    if (kReturns && in.operands[0].kind == Operand::Kind::kRegister) warp.set_bits(in.operands[0], lane, before);
  }
}

uint32_t either(uint32_t a, uint32_t b) { return a | b; }
uint32_t sum(uint32_t a, uint32_t b) { return a + b; }
uint32_t most(uint32_t a, uint32_t b) { return std::max(a, b); }

// Until a copy is waited for, its destination holds nothing that a kernel may use: NaN here.
void copy_asynchronously(const Instruction& in, Warp& warp, uint32_t lanes) {
  const uint8_t nothing[16] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    Copy copy{warp.address(in.operands[0], lane), warp.address(in.operands[1], lane), 0, 0};
    copy.bytes = static_cast<uint32_t>(warp.bits(in.operands[2], lane));
    copy.read = in.operands.size() > 3 ? static_cast<uint32_t>(warp.bits(in.operands[3], lane)) : copy.bytes;
    if ((copy.bytes != 4 && copy.bytes != 8 && copy.bytes != 16) || (copy.read != copy.bytes && copy.read != 0)) {
      in.fault("an asynchronous copy of another size than is known");
    }
    warp.block.write_shared(in, warp, copy.to, copy.bytes, nothing);
    warp.open[lane].push_back(copy);
  }
}

void land(const Instruction& in, Warp& warp, int lane) {
  for (const Copy& copy : warp.pending[lane].front()) {
    uint8_t data[16] = {};
    if (copy.read) warp.block.read_global(in, warp, copy.from, copy.bytes, data);
    warp.block.write_shared(in, warp, copy.to, copy.bytes, data);
  }
  warp.pending[lane].erase(warp.pending[lane].begin());
}

void commit_group(const Instruction&, Warp& warp, uint32_t lanes) {
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    warp.pending[lane].push_back(std::move(warp.open[lane]));
    warp.open[lane].clear();
  }
}

void wait_group(const Instruction& in, Warp& warp, uint32_t lanes) {
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    while (warp.pending[lane].size() > warp.bits(in.operands[0], lane)) land(in, warp, lane);
  }
}

void wait_all(const Instruction& in, Warp& warp, uint32_t lanes) {
  commit_group(in, warp, lanes);
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    while (!warp.pending[lane].empty()) land(in, warp, lane);
  }
}

template <bool kShared>
Handler load_of(int bytes) {
  return bytes == 1   ? load<kShared, 1>
         : bytes == 2 ? load<kShared, 2>
         : bytes == 4 ? load<kShared, 4>
                      : load<kShared, 8>;
}

template <bool kShared>
Handler store_of(int bytes) {
  return bytes == 1   ? store<kShared, 1>
         : bytes == 2 ? store<kShared, 2>
         : bytes == 4 ? store<kShared, 4>
                      : store<kShared, 8>;
}

void narrow(int& granule, int bytes) { granule = std::min(granule, bytes); }

}  // namespace

bool bind_access(Instruction& in, Program& program) {
  const std::string& name = in.modifiers[0];
  if (name == "ld" || name == "st") {
    const Access access = decoded(in);
    const bool shared = access.space == Access::Space::kShared;
    const bool loads = name == "ld";
    if (in.operands.size() != 2) in.fault("a cache policy, which is not known");
    const Operand& data = in.operands[loads ? 0 : 1];
    const size_t held = data.kind == Operand::Kind::kList ? data.list.size() : 1;
    if (held != static_cast<size_t>(access.count)) in.fault("another number of registers than elements");
    in.elements = access.count;
    in.sign = access.sign;
    narrow(shared ? program.shared_granule : program.global_granule, access.bytes * access.count);
    if (access.space == Access::Space::kParameter) {
      if (!loads || in.operands[1].kind != Operand::Kind::kParameter) in.fault("parameters are only loaded, by name");
      in.run = load_parameter;
    } else {
      in.run = loads    ? shared ? load_of<true>(access.bytes) : load_of<false>(access.bytes)
               : shared ? store_of<true>(access.bytes)
                        : store_of<false>(access.bytes);
    }
    return true;
  }
  const auto is = [&in](std::initializer_list<const char*> opcodes) {
    return std::any_of(opcodes.begin(), opcodes.end(), [&in](const char* opcode) { return in.opcode == opcode; });
  };
  if (is({"cp.async.ca.shared.global", "cp.async.cg.shared.global"})) {
    in.run = copy_asynchronously;
    narrow(program.shared_granule, 4);
    narrow(program.global_granule, 4);
  } else if (is({"cp.async.commit_group"})) {
    in.run = commit_group;
  } else if (is({"cp.async.wait_group"})) {
    in.run = wait_group;
  } else if (is({"cp.async.wait_all"})) {
    in.run = wait_all;
  } else if (is({"atom.global.gpu.acq_rel.or.b32", "atom.global.gpu.relaxed.or.b32"})) {
    in.run = atomic<either, true>;
    narrow(program.global_granule, 4);
  } else if (is({"atom.global.gpu.acq_rel.add.u32", "atom.global.gpu.relaxed.add.u32"})) {
    in.run = atomic<sum, true>;
    narrow(program.global_granule, 4);
  } else if (is({"atom.global.gpu.acq_rel.max.u32", "atom.global.gpu.relaxed.max.u32"})) {
    in.run = atomic<most, true>;
    narrow(program.global_granule, 4);
  } else if (is({"red.global.gpu.acq_rel.or.b32", "red.global.gpu.relaxed.or.b32"})) {
    in.run = atomic<either, false>;
    narrow(program.global_granule, 4);
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx

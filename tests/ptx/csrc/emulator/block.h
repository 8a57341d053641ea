// The state of a launch as it runs: a block's shared memory, its warps with their registers, and what is counted.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "memory.h"
#include "program.h"

namespace ptx {

// How unkind the emulator is, within what PTX allows.
enum Unkindness : int {
  kNoise = 1,     // approximate instructions are off by as much as their description permits, at random
  kTruncate = 2,  // sums of matrix products are cut towards zero
  kRaces = 4,     // accesses of different warps or blocks that no barrier orders are faults
};

struct Counts {
  uint64_t instructions = 0;  // of warps
  uint64_t barriers = 0;      // of blocks
  uint64_t products = 0;      // matrix instructions
  uint64_t bytes_read = 0;    // of global memory, by every lane
  uint64_t bytes_written = 0;
};

struct Shape {
  uint32_t x = 1, y = 1, z = 1;
};

// A source of random numbers that costs a few instructions.
class Chance {
 public:
  explicit Chance(uint64_t seed) : state_((seed ^ seed >> 29) * 0x9e3779b97f4a7c15ull | 1) { (*this)(); }
  uint32_t operator()() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(uint32_t bound) { return (*this)() % bound; }

 private:
  uint64_t state_;
};

struct Launch {
  const Program& program;
  Shape grid;
  uint32_t threads;
  uint64_t shared_bytes;
  std::vector<uint8_t> parameters;
  int unkindness;
  Chance chance;
  uint64_t noise;            // another for each launch: which errors approximations have
  int removed_barrier = -1;  // of the program's, as if it were not there
  Time began = 0;
  Counts counts = {};
  std::map<std::string, int> races = {};
  std::vector<Allocation*> recent = {};  // by instruction: most accesses of one go where its last one went

  bool unkind(Unkindness kind) const { return (unkindness & kind) != 0; }
  void race(const Instruction& instruction, const char* what) { ++races[std::string(what) + ": " + instruction.text]; }
};

// An asynchronous copy that has not landed.
struct Copy {
  uint64_t to;
  uint64_t from;
  uint32_t bytes;
  uint32_t read;  // or zero: zeros are written then
};

struct Block;

// Lanes that stand at one instruction.
struct Group {
  int at;
  uint32_t lanes;
};

struct Warp {
  Block& block;
  int16_t number;
  uint8_t* file;
  const uint8_t* constants;
  std::vector<Group> groups;
  bool waiting = false;
  std::array<std::vector<Copy>, kLanes> open = {};                  // not yet of a group
  std::array<std::vector<std::vector<Copy>>, kLanes> pending = {};  // groups, oldest first

  uint32_t alive() const {
    uint32_t lanes = 0;
    for (const Group& group : groups) lanes |= group.lanes;
    return lanes;
  }

  // A register's or a constant's lanes, of a type of 2, 4 or 8 bytes.
  template <class T>
  T* lanes(const Operand& operand) const {
    if (operand.kind == Operand::Kind::kRegister) return reinterpret_cast<T*>(file + operand.place);
    const uint32_t within = sizeof(T) == 8 ? 0 : sizeof(T) == 4 ? kConstant4 : kConstant2;
    return reinterpret_cast<T*>(const_cast<uint8_t*>(constants) + operand.place + within);
  }

  // A predicate's lanes as bits.
  uint32_t& predicate(const Operand& operand) const { return *reinterpret_cast<uint32_t*>(file + operand.place); }

  uint32_t holds(const Operand& operand) const {
    return operand.kind == Operand::Kind::kConstant ? (lanes<uint32_t>(operand)[0] & 1 ? kAll : 0) : predicate(operand);
  }

  // The bits of one lane, whatever the width.
  uint64_t bits(const Operand& operand, int lane) const {
    if (operand.kind == Operand::Kind::kConstant) return lanes<uint64_t>(operand)[lane];
    switch (operand.width) {
      case 1:
        return predicate(operand) >> lane & 1;
      case 2:
        return lanes<uint16_t>(operand)[lane];
      case 4:
        return lanes<uint32_t>(operand)[lane];
      default:
        return lanes<uint64_t>(operand)[lane];
    }
  }

  void set_bits(const Operand& operand, int lane, uint64_t value) const {
    switch (operand.width) {
      case 1:
        predicate(operand) = (predicate(operand) & ~(1u << lane)) | static_cast<uint32_t>(value & 1) << lane;
        break;
      case 2:
        lanes<uint16_t>(operand)[lane] = static_cast<uint16_t>(value);
        break;
      case 4:
        lanes<uint32_t>(operand)[lane] = static_cast<uint32_t>(value);
        break;
      default:
        lanes<uint64_t>(operand)[lane] = value;
    }
  }

  uint64_t address(const Operand& operand, int lane) const {
    const uint64_t base =
        operand.based ? operand.width == 4 ? lanes_at<uint32_t>(operand)[lane] : lanes_at<uint64_t>(operand)[lane] : 0;
    return base + static_cast<uint64_t>(operand.displacement);
  }

 private:
  template <class T>
  const T* lanes_at(const Operand& operand) const {
    return reinterpret_cast<const T*>(file + operand.place);
  }
};

struct Block {
  Launch& launch;
  std::vector<uint8_t> shared;
  Marks marks;
  Time now;
  Time began;

  Moment moment(const Warp& warp) const;

  // Global memory, checked: bounds, alignment, races.
  void read_global(const Instruction&, const Warp&, uint64_t address, uint32_t bytes, void* into);
  void write_global(const Instruction&, const Warp&, uint64_t address, uint32_t bytes, const void* from);
  uint32_t update_global(const Instruction&, const Warp&, uint64_t address, uint32_t (*change)(uint32_t, uint32_t),
                         uint32_t with);
  // Shared memory likewise.
  void read_shared(const Instruction&, const Warp&, uint64_t address, uint32_t bytes, void* into);
  void write_shared(const Instruction&, const Warp&, uint64_t address, uint32_t bytes, const void* from);

 private:
  Allocation& allocation(const Instruction&, uint64_t address, uint32_t bytes);
};

// The loop over lanes that vectorises where all are active.
template <class F>
inline void each(uint32_t lanes, F f) {
  if (lanes == kAll) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (uint32_t left = lanes; left; left &= left - 1) f(__builtin_ctz(left));
  }
}

// Runs every block; throws a Fault.
void run(Launch& launch);

}  // namespace ptx

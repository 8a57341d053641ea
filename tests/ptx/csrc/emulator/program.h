// A kernel as its PTX says it: instructions with operands in place, before anything runs.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAll = ~0u;  // every lane of a warp

struct Warp;
struct Instruction;

// What an instruction does to the lanes of a warp that are active and whose guard holds.
using Handler = void (*)(const Instruction&, Warp&, uint32_t lanes);

// What went wrong in a kernel: the message of the launch's error.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Operand {
  enum class Kind { kNothing, kRegister, kConstant, kMemory, kParameter, kList };

  Kind kind = Kind::kNothing;
  int width = 0;             // bytes of a register, 1 of a predicate
  uint32_t place = 0;        // of the register in the file, of the constant in the pool
  bool based = false;        // memory: whether a register is added to the displacement
  int64_t displacement = 0;  // memory and parameters
  std::vector<Operand> list;
};

struct Instruction {
  enum class Flow { kNext, kBranch, kExit, kBarrier };

  std::string text;                    // as written, for messages
  std::string opcode;                  // whole, with its modifiers
  std::vector<std::string> modifiers;  // what the dots of the opcode separate
  std::vector<Operand> operands;
  Handler run = nullptr;
  Flow flow = Flow::kNext;
  int index = 0;
  bool guarded = false;
  bool guard_negated = false;
  Operand guard;
  int elements = 1;   // that a load or a store moves for a lane
  bool sign = false;  // whether a load extends it
  int target = 0;     // of a branch
  int barrier = 0;    // which of the kernel's barriers

  [[noreturn]] void fault(const std::string& what) const { throw Fault(what + ": " + text); }
};

struct Parameter {
  int size = 0;
  int offset = 0;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Parameter> parameters;
  uint32_t file_bytes = 0;                  // registers of a warp
  std::vector<uint8_t> constants;           // each for 32 lanes, in every width
  std::map<std::string, uint32_t> special;  // places of %tid.x and its like, where they are used
  uint64_t static_shared = 0;
  int barriers = 0;
  int shared_granule = 16;  // bytes of the narrowest access
  int global_granule = 16;
};

// Constants stand in the pool for lanes of 8 bytes, then of 4, then of 2.
constexpr uint32_t kConstant4 = 8 * kLanes;
constexpr uint32_t kConstant2 = kConstant4 + 4 * kLanes;
constexpr uint32_t kConstantBytes = kConstant2 + 2 * kLanes;

// The one kernel of a PTX text. Throws a Fault where the text has what the emulator does not know.
Program parse(const std::string& text);

// The handler of an opcode, its operands checked; a Fault where it is not known.
void bind(Instruction& instruction, Program& program);

}  // namespace ptx

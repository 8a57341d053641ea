// How the library was built and which instruction set serves here, for ctypes (operators/native/build_info.py): C
// functions, so that one file serves every Python, and none of torch, so that it loads where the library does not.
#include <exception>
#include <string>

#include "instruction_sets.h"

#define STELLA_SHOWN extern "C" __attribute__((visibility("default")))

namespace {

std::string names_of(bool here) {
  std::string names;
  for (const stella::InstructionSet& set : stella::instruction_sets())
    if (!here || set.runs_here()) names += (names.empty() ? "" : ",") + std::string(set.name);
  return names;
}

}  // namespace

STELLA_SHOWN const char* stella_compiler() { return STELLA_COMPILER; }

STELLA_SHOWN const char* stella_torch_at_build() { return STELLA_TORCH_VERSION; }

// Those in this build, best first, and of them those that run here.
STELLA_SHOWN const char* stella_instruction_sets(int here) {
  static const std::string built = names_of(false), running = names_of(true);
  return (here ? running : built).c_str();
}

// The one that serves here and the bytes of its vectors; where none does, the reason and 0.
STELLA_SHOWN const char* stella_instruction_set(int* vector_bytes) {
  try {
    const stella::InstructionSet& chosen = stella::chosen_instruction_set();
    *vector_bytes = chosen.vector_bytes;
    return chosen.name;
  } catch (const std::exception& error) {
    static thread_local std::string reason;
    reason = error.what();
    *vector_bytes = 0;
    return reason.c_str();
  }
}

// The instruction sets that a build holds kernels for, and which of them serves.
#pragma once

#include <vector>

namespace stella {

struct InstructionSet {
  const char* name;
  int vector_bytes;
  bool (*runs_here)();
};

// Those in this build, best first; the last runs on every processor of the family.
const std::vector<InstructionSet>& instruction_sets();

// The best that runs here, or the one that STELLA_KERNELS_ISA names, chosen at the first call. Throws
// std::runtime_error where that is none of those that run here.
const InstructionSet& chosen_instruction_set();

}  // namespace stella

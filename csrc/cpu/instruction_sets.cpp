// The choice of the instruction set, once, at the first call.
#include "instruction_sets.h"

#include <cctype>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace stella {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> built = {
#if defined(STELLA_HAVE_AVX512)
      {"avx512", 64,
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
       }},
#endif
#if defined(STELLA_HAVE_AVX2)
      {"avx2", 32, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
      {"baseline", 16, [] { return true; }},
  };
  return built;
}

namespace {

// The package has refused an unknown name while it was imported; this is for who sets one since.
const InstructionSet& choose() {
  const char* set = std::getenv("STELLA_KERNELS_ISA");
  std::string wanted = set ? set : "", here;
  for (char& letter : wanted) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  for (const InstructionSet& candidate : instruction_sets()) {
    if (!candidate.runs_here()) continue;
    if (wanted.empty() || wanted == candidate.name) return candidate;
    here += (here.empty() ? "'" : ", '") + std::string(candidate.name) + "'";
  }
  throw std::runtime_error("STELLA_KERNELS_ISA: found '" + wanted + "', wanted one of " + here +
                           ", which this processor has; unset it for the best of them.");
}

}  // namespace

const InstructionSet& chosen_instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace stella

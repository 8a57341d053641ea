// The choice of the instruction set, once, at the first call.
#include <cctype>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/kernels.h"

namespace stella {

#define STELLA_DECLARE(isa)  \
  namespace isa {            \
  const IsaKernels& table(); \
  }

#if defined(STELLA_HAVE_AVX512)
STELLA_DECLARE(avx512)
#endif
#if defined(STELLA_HAVE_AVX2)
STELLA_DECLARE(avx2)
#endif
STELLA_DECLARE(baseline)

namespace {

struct Candidate {
  const char* name;
  const IsaKernels& (*table)();
  bool (*runs_here)();
};

const Candidate kCandidates[] = {
#if defined(STELLA_HAVE_AVX512)
    {"avx512", avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
     }},
#endif
#if defined(STELLA_HAVE_AVX2)
    {"avx2", avx2::table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", baseline::table, [] { return true; }},
};

std::vector<const char*> names_of(bool (*wanted)(const Candidate&)) {
  std::vector<const char*> names;
  for (const Candidate& candidate : kCandidates)
    if (wanted(candidate)) names.push_back(candidate.name);
  names.push_back(nullptr);
  return names;
}

// The package has refused an unknown name while it was imported; this is for who sets one since.
const IsaKernels& choose() {
  const char* set = std::getenv("STELLA_KERNELS_ISA");
  std::string wanted = set ? set : "", here;
  for (char& letter : wanted) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  for (const Candidate& candidate : kCandidates) {
    if (!candidate.runs_here()) continue;
    if (wanted.empty() || wanted == candidate.name) return candidate.table();
    here += (here.empty() ? "'" : ", '") + std::string(candidate.name) + "'";
  }
  throw std::runtime_error("STELLA_KERNELS_ISA: found '" + wanted + "', wanted one of " + here +
                           ", which this processor has; unset it for the best of them.");
}

}  // namespace

const IsaKernels& kernels() {
  static const IsaKernels& chosen = choose();
  return chosen;
}

const char* const* built_instruction_sets() {
  static const std::vector<const char*> names = names_of([](const Candidate&) { return true; });
  return names.data();
}

const char* const* instruction_sets_here() {
  static const std::vector<const char*> names = names_of([](const Candidate& c) { return c.runs_here(); });
  return names.data();
}

}  // namespace stella

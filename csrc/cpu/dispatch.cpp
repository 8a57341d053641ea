// The choice of the instruction set, once, at the first call.
#include <cstdio>
#include <cstdlib>
#include <cstring>

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

const IsaKernels& choose() {
  const char* wanted = std::getenv("STELLA_KERNELS_ISA");
  for (const Candidate& candidate : kCandidates) {
    if (wanted && *wanted && std::strcmp(wanted, candidate.name) != 0) continue;
    if (candidate.runs_here()) return candidate.table();
  }
  std::fprintf(stderr,
               "stella_kernels: STELLA_KERNELS_ISA=%s is not in this build or not on this processor; "
               "the baseline kernels serve.\n",
               wanted);
  return baseline::table();
}

}  // namespace

const IsaKernels& kernels() {
  static const IsaKernels& chosen = choose();
  return chosen;
}

const char* const* built_instruction_sets() {
  static const char* const names[] = {
#if defined(STELLA_HAVE_AVX512)
      "avx512",
#endif
#if defined(STELLA_HAVE_AVX2)
      "avx2",
#endif
      "baseline", nullptr};
  return names;
}

}  // namespace stella

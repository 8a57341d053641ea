// The kernels of the instruction set that was chosen.
#include <string>

#include "common/kernels.h"
#include "instruction_sets.h"

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

const IsaKernels& table_of(const std::string& name) {
#if defined(STELLA_HAVE_AVX512)
  if (name == "avx512") return avx512::table();
#endif
#if defined(STELLA_HAVE_AVX2)
  if (name == "avx2") return avx2::table();
#endif
  return baseline::table();
}

}  // namespace

const IsaKernels& kernels() {
  static const IsaKernels& chosen = table_of(chosen_instruction_set().name);
  return chosen;
}

}  // namespace stella

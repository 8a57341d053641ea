// Everything above, compiled for one instruction set, as a table of functions.
#include "adapter/adapter.h"
#include "stiefel/adamw/adamw.h"
#include "stiefel/gradient.h"
#include "stiefel/polar.h"
#include "stiefel/retract.h"

namespace stella::STELLA_ISA {
namespace {

Plan plan(int64_t n, int64_t r, Storage storage, bool two_operands) {
  const int bytes = storage == Storage::float64 ? 8 : 4;
  Plan p;
  p.chunk_rows = chunk_rows_for(two_operands ? 2 * r : r, n > 0 ? n : 1, bytes);
  p.block_rows = 4 * chunk_rows_for(two_operands ? 2 * r : r, int64_t(1) << 40, bytes);
  p.gram_rows = kGramRows;
  p.gram_columns = kGramColumns;
  p.combine_columns = kCombineColumns;
  p.combine_vectors = kCombineVectors;
  return p;
}

constexpr AdapterKernels kAdapterKernels = {adapter_plan,     pack_factor,   pack_core,   adapter_forward,
                                            adapter_backward, unpack_factor, unpack_core, dropout_rows};

}  // namespace

#define STELLA_STRING_OF(x) #x
#define STELLA_STRING(x) STELLA_STRING_OF(x)

const IsaKernels& table() {
  static const IsaKernels kernels = {STELLA_STRING(STELLA_ISA),
                                     STELLA_VECTOR_BYTES,
                                     plan,
                                     polar,
                                     retract,
                                     gradient,
                                     largest_magnitude,
                                     polar_gram,
                                     polar_solve,
                                     polar_update,
                                     polar_accept,
                                     retract_gram,
                                     retract_solve,
                                     retract_solve_far,
                                     retract_update,
                                     gradient_gram,
                                     gradient_accept,
                                     gradient_update,
                                     adamw,
                                     adamw_fits,
                                     adamw_steps_bytes,
                                     adamw_steps_by_rows,
                                     adamw_coupling,
                                     adamw_step,
                                     adamw_solve,
                                     adamw_update,
                                     adamw_fallback,
                                     &kAdapterKernels};
  return kernels;
}

}  // namespace stella::STELLA_ISA

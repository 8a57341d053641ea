#include "adapter/schedule.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace stella {
namespace {

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory that the calling thread keeps from call to call.
char* kept_memory(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 64, static_cast<size_t>(round_up(bytes, 4096))) != 0) throw std::bad_alloc();
    memory.reset(fresh);
    size = bytes;
  }
  return static_cast<char*>(memory.get());
}

// Sizes, in elements, of what is packed: each a multiple of a cache line.
struct Layout {
  int64_t U, V, core, bytes;

  Layout(const AdapterShape& shape, const AdapterPlan& plan)
      : U(blocks_of(shape.m, plan.columns) * plan.block_elements),
        V(blocks_of(shape.n, plan.columns) * plan.block_elements),
        core(round_up(round_up(shape.r, 4) * plan.core_leading, 16)),
        bytes(shape.wide ? 8 : 4) {}
};

void pack_factors(const Pool& pool, const AdapterKernels& k, const AdapterShape& shape, const AdapterPlan& plan,
                  const AdapterFactors& factors, void* U, void* V) {
  const int64_t first = blocks_of(shape.m, plan.columns), second = blocks_of(shape.n, plan.columns);
  run_queue(pool, first + second, [&](int64_t i) {
    if (i < first)
      k.pack_factor(shape, plan, factors.U, i, U);
    else
      k.pack_factor(shape, plan, factors.V, i - first, V);
  });
}

}  // namespace

void adapter_forward(const Pool& pool, AdapterForward job, const AdapterFactors& factors) {
  const AdapterKernels& k = *kernels().adapter;
  const AdapterShape& shape = job.shape;
  job.plan = k.plan(shape, false);
  const Layout layout(shape, job.plan);
  char* memory = kept_memory((layout.U + layout.V + layout.core) * layout.bytes);
  char *U = memory, *V = U + layout.U * layout.bytes, *core = V + layout.V * layout.bytes;
  pack_factors(pool, k, shape, job.plan, factors, U, V);
  k.pack_core(shape, job.plan, factors.core, !factors.diagonal, core);
  job.U = U;
  job.V = V;
  job.core = core;
  job.diagonal = factors.diagonal;
  // Chunks small enough that every thread has several.
  const int64_t share = round_up(blocks_of(shape.T, 4 * pool.threads), 16);
  const int64_t rows = std::clamp<int64_t>(share, 16, job.plan.rows);
  run_queue(pool, blocks_of(shape.T, rows),
            [&](int64_t i) { k.forward(job, i * rows, std::min(shape.T, (i + 1) * rows)); });
}

void adapter_backward(const Pool& pool, AdapterBackward job, const AdapterFactors& factors,
                      const AdapterFactors& gradients) {
  const AdapterKernels& k = *kernels().adapter;
  const AdapterShape& shape = job.shape;
  job.plan = k.plan(shape, true);
  const Layout layout(shape, job.plan);
  // Every group has sums of its own, added in the groups' order: the result depends on the number of threads in its
  // round-off alone, and on nothing else.
  const int64_t groups = std::clamp<int64_t>(blocks_of(shape.T, job.plan.rows), 1, pool.threads);
  const int64_t stride = (job.need_U ? layout.U : 0) + (job.need_V ? layout.V : 0) + (job.need_S ? layout.core : 0);
  char* memory = kept_memory((layout.U + layout.V + 2 * layout.core + groups * stride) * layout.bytes);
  char *U = memory, *V = U + layout.U * layout.bytes, *core = V + layout.V * layout.bytes;
  char *transposed = core + layout.core * layout.bytes, *sums = transposed + layout.core * layout.bytes;
  pack_factors(pool, k, shape, job.plan, factors, U, V);
  k.pack_core(shape, job.plan, factors.core, false, core);
  k.pack_core(shape, job.plan, factors.core, !factors.diagonal, transposed);
  job.U = U;
  job.V = V;
  job.core = core;
  job.transposed_core = transposed;
  job.diagonal = factors.diagonal;

  const int64_t at_V = job.need_U ? layout.U : 0, at_core = at_V + (job.need_V ? layout.V : 0);
  const int64_t share = round_up(blocks_of(shape.T, groups), 16);
  run_queue(pool, groups, [&](int64_t g) {
    char* mine = sums + g * stride * layout.bytes;
    std::memset(mine, 0, static_cast<size_t>(stride * layout.bytes));
    const AdapterSums own = {mine, mine + at_V * layout.bytes, mine + at_core * layout.bytes};
    const int64_t end = std::min(shape.T, (g + 1) * share);
    for (int64_t row = g * share; row < end; row += job.plan.rows)
      k.backward(job, row, std::min(end, row + job.plan.rows), own);
  });

  const int64_t first = job.need_U ? blocks_of(shape.m, job.plan.columns) : 0;
  const int64_t second = job.need_V ? blocks_of(shape.n, job.plan.columns) : 0;
  run_queue(pool, first + second, [&](int64_t i) {
    if (i < first)
      k.unpack_factor(shape, job.plan, sums, groups, stride, i, gradients.U);
    else
      k.unpack_factor(shape, job.plan, sums + at_V * layout.bytes, groups, stride, i - first, gradients.V);
  });
  if (job.need_S) k.unpack_core(shape, job.plan, sums + at_core * layout.bytes, groups, stride, gradients.core);
}

void philox_dropout(const Pool& pool, const MatrixView& x, const MatrixView& out, const Dropout& dropout) {
  constexpr int64_t kElements = 1 << 16;
  const AdapterKernels& k = *kernels().adapter;
  const int64_t rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, x.r));
  run_queue(pool, blocks_of(x.n, rows),
            [&](int64_t i) { k.dropout(x, out, dropout, i * rows, std::min(x.n, (i + 1) * rows)); });
}

}  // namespace stella

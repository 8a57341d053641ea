// What the adapter's operators hand to its kernels: plain structs, no torch.
#pragma once

#include <cstdint>

#include "common/kernels.h"

namespace stella {

// An element of the (T, n) input is kept where its 16 bits of Philox are at least the threshold (reference/philox.py).
struct Dropout {
  uint64_t seed = 0;
  uint64_t threshold = 0;  // 0 keeps everything, 2^16 nothing
  double scale = 1.0;      // of what is kept
  bool active = false;
};

// Rows and columns as they are: (T, features), or a factor as (features, r), where strides alone say how it is stored.
// The arithmetic is float64 where `wide` says so, else float32; every matrix is converted on its way.
struct AdapterShape {
  int64_t T, m, n, r;
  bool wide;
};

// Sizes of the blocks that a job is cut into; packed factors are laid out by them.
struct AdapterPlan {
  int64_t columns;         // of a block of features
  int64_t leading;         // distance of a packed factor's columns
  int64_t rows;            // of a chunk
  int64_t block_elements;  // of a packed block of a factor: r columns, padded to the register tile
  int64_t core_leading;    // distance of the rows of a packed S
};

struct AdapterForward {
  AdapterShape shape;
  AdapterPlan plan;
  MatrixView x, y, A;        // (T, n), (T, m), (T, r)
  MatrixView bias;           // (1, m); data is nullptr: none
  bool accumulate;           // into y; else y is bias or nothing, and the adapter's output
  bool stream;               // y is too large to stay in the cache: write past it where that is possible
  const void *U, *V, *core;  // packed; core is S^T
  bool diagonal;
  double scale;
  Dropout dropout;
};

struct AdapterBackward {
  AdapterShape shape;
  AdapterPlan plan;
  MatrixView grad_y, x, A, grad_x;  // grad_x: data is nullptr where it is not asked for
  double beta;                      // grad_x = beta grad_x + the adapter's part
  bool stream;                      // grad_x
  const void *U, *V, *core, *transposed_core;
  bool diagonal, need_U, need_S, need_V;
  double scale;
  Dropout dropout;
};

// Sums of one group of rows, in the arithmetic type: packed as the factors are, and as the core is.
struct AdapterSums {
  void *U, *V, *core;
};

struct AdapterKernels {
  AdapterPlan (*plan)(const AdapterShape&, bool backward);
  // Block `block` of a factor, seen as (features, r), and the core (r, r) or (1, r); to where a packed one starts.
  void (*pack_factor)(const AdapterShape&, const AdapterPlan&, const MatrixView& factor, int64_t block, void* packed);
  void (*pack_core)(const AdapterShape&, const AdapterPlan&, const MatrixView& core, bool transposed, void* packed);
  // Rows [begin, end) of at most plan.rows.
  void (*forward)(const AdapterForward&, int64_t begin, int64_t end);
  void (*backward)(const AdapterBackward&, int64_t begin, int64_t end, const AdapterSums& sums);
  // Columns [begin, end) of the packed sums of `groups` groups, `stride` elements apart, to a gradient (features, r).
  void (*unpack_factor)(const AdapterShape&, const AdapterPlan&, const void* sums, int64_t groups, int64_t stride,
                        int64_t block, const MatrixView& gradient);
  void (*unpack_core)(const AdapterShape&, const AdapterPlan&, const void* sums, int64_t groups, int64_t stride,
                      const MatrixView& gradient);
  // Rows [begin, end) of out = dropout(x), rounded as torch rounds.
  void (*dropout)(const MatrixView& x, const MatrixView& out, const Dropout&, int64_t begin, int64_t end);
};

}  // namespace stella

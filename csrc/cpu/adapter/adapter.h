// The adapter's products on a chunk of rows: what is read of x, grad_y and their results is in the cache when it is
// used again, and neither a mask, a dropped or widened copy of x nor a product of size (T, m) is ever in memory.
#pragma once

#include "adapter/tiles.h"

namespace stella::STELLA_ISA {
namespace {

constexpr int64_t kChunkRows = 128;
constexpr int64_t kGroupRows = 16;                          // rows that go through a block of features together
constexpr int64_t kFactorBytes = 96 << 10;                  // a packed block of a factor, beside the rows in L2
constexpr int64_t kFewestColumns = 96, kMostColumns = 960;  // multiples of every instruction set's strip
constexpr int64_t kBackwardColumns = 480;                   // a chunk's panel of activations stays in L2

AdapterPlan adapter_plan(const AdapterShape& shape, bool backward) {
  // A layer of rank 0, or without features, is planned as the smallest there is: nothing here may be zero.
  const int64_t rank = shape.r > 1 ? shape.r : 1, most_features = shape.m > shape.n ? shape.m : shape.n;
  const int64_t bytes = shape.wide ? 8 : 4, r4 = round_up(rank, kTileRows);
  const int64_t features = round_up(most_features > 1 ? most_features : 1, kFewestColumns);
  int64_t columns = kFactorBytes / (bytes * r4) / kFewestColumns * kFewestColumns;
  const int64_t most = backward ? kBackwardColumns : kMostColumns;
  columns = columns > most ? most : columns < kFewestColumns ? kFewestColumns : columns;
  columns = columns > features ? features : columns;
  AdapterPlan plan;
  plan.columns = columns;
  // A vector more than a multiple of every strip: columns of a panel must not all fall into the same cache sets.
  plan.leading = columns + 64 / bytes;
  plan.rows = kChunkRows;
  plan.block_elements = r4 * plan.leading;
  plan.core_leading = round_up(rank, STELLA_VECTOR_BYTES / bytes);
  return plan;
}

template <typename Body>
void with_adapter_arithmetic(const AdapterShape& shape, Body&& body) {
  if (shape.wide)
    body(0.0);
  else
    body(0.0f);
}

template <typename T>
int64_t padded_columns(int64_t count) {
  return round_up(count, kLanes<T>);
}

void pack_factor(const AdapterShape& shape, const AdapterPlan& plan, const MatrixView& factor, int64_t block,
                 void* packed) {
  with_adapter_arithmetic(shape, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(packed) + block * plan.block_elements;
    const int64_t begin = block * plan.columns;
    const int64_t count = factor.n - begin < plan.columns ? factor.n - begin : plan.columns;
    pack(factor, begin, count, plan.leading, to, plan.leading, T(1));
    for (int64_t i = factor.r * plan.leading; i < plan.block_elements; ++i) to[i] = T(0);
  });
}

void pack_core(const AdapterShape& shape, const AdapterPlan& plan, const MatrixView& core, bool transposed,
               void* packed) {
  with_adapter_arithmetic(shape, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(packed);
    for (int64_t i = 0; i < round_up(shape.r, kTileRows) * plan.core_leading; ++i) to[i] = T(0);
    const MatrixView view =
        transposed ? MatrixView{core.data, core.r, core.n, core.col_stride, core.row_stride, core.storage} : core;
    for (int64_t i = 0; i < view.n; ++i)
      pack_row(view, i, 0, view.r, plan.core_leading, nullptr, T(1), to + i * plan.core_leading);
  });
}

// Scratch of one thread for a chunk of rows.
template <typename T>
struct ChunkScratch {
  T *panel, *result, *coefficients, *other, *rows_r[3];
  double* sums;
  uint32_t* mask;

  ChunkScratch(const AdapterShape& shape, const AdapterPlan& plan) {
    Scratch& s = scratch();
    const int64_t r4 = round_up(shape.r, kTileRows), mask_row = plan.leading + kMaskPadding;
    panel = s.panel.reserve<T>(kChunkRows * plan.leading);
    result = s.output.reserve<T>(kGroupRows * plan.leading);
    coefficients = s.coefficients.reserve<T>(2 * kChunkRows * r4);
    other = coefficients + kChunkRows * r4;
    T* small = s.tall.reserve<T>(3 * kChunkRows * plan.core_leading);
    for (int k = 0; k < 3; ++k) rows_r[k] = small + k * kChunkRows * plan.core_leading;
    sums = s.gram.reserve<double>(kChunkRows * shape.r);
    mask = s.vectors.reserve<uint32_t>(kGroupRows * mask_row);
  }
};

// values (rows, leading) = left (rows, r) times the packed core (r, leading).
template <typename T, typename F>
void times_packed_core(const AdapterShape& shape, const AdapterPlan& plan, int64_t rows, F&& left, const T* core,
                       bool diagonal, T* coefficients, T* values) {
  const int64_t r = shape.r, leading = plan.core_leading;
  if (diagonal) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < r; ++j) values[i * leading + j] = left(i, j) * core[j];
    return;
  }
  block_rows<T>(rows, r, left, coefficients);
  combine(core, r, leading, coefficients, rows, static_cast<const T*>(nullptr), values, leading, leading);
}

// The masks of columns [begin, begin + count) of `rows` rows; where the row's first one is goes to `starts`.
STELLA_INLINE void masks_of_rows(const Dropout& dropout, const PhiloxKeys& keys, int64_t row, int64_t rows,
                                 int64_t begin, int64_t count, int64_t distance, uint32_t* buffer,
                                 const uint32_t** starts) {
  for (int64_t i = 0; i < rows; ++i) starts[i] = mask_of(dropout, keys, row + i, begin, count, buffer + i * distance);
}

template <typename T>
void forward_rows(const AdapterForward& job, int64_t begin, int64_t end) {
  const AdapterShape& shape = job.shape;
  const AdapterPlan& plan = job.plan;
  const int64_t rows = end - begin, r = shape.r, mask_row = plan.leading + kMaskPadding;
  ChunkScratch<T> s(shape, plan);
  const PhiloxKeys keys(job.dropout.seed);
  for (int64_t i = 0; i < round_up(rows, kTileRows) * r; ++i) s.sums[i] = 0.0;
  for (int64_t k = 0; k < shape.n; k += plan.columns) {
    const int64_t count = shape.n - k < plan.columns ? shape.n - k : plan.columns, padded = padded_columns<T>(count);
    const T* V = static_cast<const T*>(job.V) + k / plan.columns * plan.block_elements;
    const bool direct = is_panel<T>(job.x) && !job.dropout.active && padded == count;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      fetch_rows(job.x, begin + i + kTileRows, end, k, count);
      if (direct && i + kTileRows <= rows) {
        const T* x = static_cast<const T*>(job.x.data) + (begin + i) * job.x.row_stride + k;
        dot_rows(x, job.x.row_stride, V, plan.leading, r, padded, s.sums + i * r, r);
        continue;
      }
      const int64_t some = rows - i < kTileRows ? rows - i : kTileRows;
      const uint32_t* masks[kTileRows] = {};
      if (job.dropout.active) masks_of_rows(job.dropout, keys, begin + i, some, k, count, mask_row, s.mask, masks);
      for (int64_t t = 0; t < some; ++t)
        pack_row(job.x, begin + i + t, k, count, padded, masks[t], static_cast<T>(job.dropout.scale),
                 s.panel + t * plan.leading);
      dot_rows(s.panel, plan.leading, V, plan.leading, r, padded, s.sums + i * r, r);
    }
  }
  with_storage(job.A, [&](auto* data) {
    using S = std::remove_pointer_t<decltype(data)>;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < r; ++j)
        data[(begin + i) * job.A.row_stride + j * job.A.col_stride] = Narrow<S>::from(s.sums[i * r + j]);
  });

  T* P = s.rows_r[0];
  times_packed_core(
      shape, plan, rows, [&](int64_t i, int64_t j) { return static_cast<T>(s.sums[i * r + j]); },
      static_cast<const T*>(job.core), job.diagonal, s.coefficients, P);
  const T scale = static_cast<T>(job.scale);
  block_rows<T>(rows, r, [&](int64_t i, int64_t j) { return scale * P[i * plan.core_leading + j]; }, s.coefficients);

  const bool stream = job.stream && !job.accumulate && is_panel<float>(job.y) && std::is_same_v<T, float>;
  const bool in_place = job.accumulate && !job.bias.data && is_panel<T>(job.y);
  for (int64_t k = 0; k < shape.m; k += plan.columns) {
    const int64_t count = shape.m - k < plan.columns ? shape.m - k : plan.columns, padded = padded_columns<T>(count);
    const T* U = static_cast<const T*>(job.U) + k / plan.columns * plan.block_elements;
    T* bias = nullptr;
    if (job.bias.data) {
      bias = s.panel;
      pack_row(job.bias, 0, k, count, padded, nullptr, T(1), bias);
    }
    for (int64_t i = 0; i < rows; i += kGroupRows) {
      const int64_t some = rows - i < kGroupRows ? rows - i : kGroupRows;
      if (in_place && padded == count && some % kTileRows == 0) {
        T* y = static_cast<T*>(job.y.data) + (begin + i) * job.y.row_stride + k;
        combine<T>({U, r, plan.leading}, {nullptr, 0, 0}, s.coefficients + i * r, some, y, job.y.row_stride, y,
                   job.y.row_stride, count);
        continue;
      }
      combine(U, r, plan.leading, s.coefficients + i * r, some, static_cast<const T*>(nullptr), s.result, plan.leading,
              padded);
      with_storage(job.y, [&](auto* data) {
        for (int64_t t = 0; t < some; ++t) {
          auto* to = data + (begin + i + t) * job.y.row_stride + k * job.y.col_stride;
          T* values = s.result + t * plan.leading;
          if constexpr (std::is_same_v<T, float> && std::is_same_v<decltype(to), float*>) {
            if (stream) {
              if (bias)
                for (int64_t c = 0; c < count; ++c) values[c] += bias[c];
              stream_row(to, values, count);
              continue;
            }
          }
          add_row(to, job.y.col_stride, values, bias, nullptr, T(1), job.accumulate ? T(1) : T(0), count);
        }
      });
    }
  }
#ifdef __SSE2__
  if (stream) _mm_sfence();
#endif
}

template <typename T>
void backward_rows(const AdapterBackward& job, int64_t begin, int64_t end, const AdapterSums& sums) {
  const AdapterShape& shape = job.shape;
  const AdapterPlan& plan = job.plan;
  const int64_t rows = end - begin, r = shape.r, core_leading = plan.core_leading;
  const int64_t mask_row = plan.leading + kMaskPadding;
  ChunkScratch<T> s(shape, plan);
  const bool need_input = job.grad_x.data != nullptr, need_K = need_input || job.need_V, need_Q = need_K || job.need_S;
  const T scale = static_cast<T>(job.scale);

  T *A = s.rows_r[0], *Q = s.rows_r[1], *K = s.rows_r[2];
  if (job.need_U || job.need_S) {
    for (int64_t i = 0; i < rows; ++i)
      pack_row(job.A, begin + i, 0, r, core_leading, nullptr, T(1), A + i * core_leading);
  }
  if (job.need_U) {  // P, in Q's place
    times_packed_core(
        shape, plan, rows, [&](int64_t i, int64_t j) { return A[i * core_leading + j]; },
        static_cast<const T*>(job.transposed_core), job.diagonal, s.coefficients, Q);
    block_columns<T>(rows, r, [&](int64_t i, int64_t j) { return scale * Q[i * core_leading + j]; }, s.other);
  }
  for (int64_t i = 0; i < round_up(rows, kTileRows) * r; ++i) s.sums[i] = 0.0;
  for (int64_t k = 0; k < shape.m; k += plan.columns) {
    const int64_t count = shape.m - k < plan.columns ? shape.m - k : plan.columns, padded = padded_columns<T>(count);
    const int64_t offset = k / plan.columns * plan.block_elements;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t some = rows - i < kTileRows ? rows - i : kTileRows;
      T* panel = s.panel + i * plan.leading;
      fetch_rows(job.grad_y, begin + i + kTileRows, end, k, count);
      for (int64_t t = 0; t < some; ++t)
        pack_row(job.grad_y, begin + i + t, k, count, padded, nullptr, T(1), panel + t * plan.leading);
      if (need_Q)
        dot_rows(panel, plan.leading, static_cast<const T*>(job.U) + offset, plan.leading, r, padded, s.sums + i * r,
                 r);
    }
    if (job.need_U) {
      T* sum = static_cast<T*>(sums.U) + offset;
      combine(s.panel, rows, plan.leading, s.other, r, static_cast<const T*>(sum), sum, plan.leading, padded);
    }
  }
  if (!need_Q) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < r; ++j) Q[i * core_leading + j] = static_cast<T>(job.scale * s.sums[i * r + j]);
  if (job.need_S) {
    T* sum = static_cast<T*>(sums.core);
    if (job.diagonal) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < r; ++j) sum[j] += Q[i * core_leading + j] * A[i * core_leading + j];
    } else {
      block_columns<T>(rows, r, [&](int64_t i, int64_t j) { return Q[i * core_leading + j]; }, s.coefficients);
      combine(A, rows, core_leading, s.coefficients, r, static_cast<const T*>(sum), sum, core_leading, core_leading);
    }
  }
  if (!need_K) return;
  times_packed_core(
      shape, plan, rows, [&](int64_t i, int64_t j) { return Q[i * core_leading + j]; }, static_cast<const T*>(job.core),
      job.diagonal, s.coefficients, K);
  block_rows<T>(rows, r, [&](int64_t i, int64_t j) { return K[i * core_leading + j]; }, s.coefficients);
  block_columns<T>(rows, r, [&](int64_t i, int64_t j) { return K[i * core_leading + j]; }, s.other);

  const PhiloxKeys keys(job.dropout.seed);
  const T kept_scale = static_cast<T>(job.dropout.scale), beta = static_cast<T>(job.beta);
  const bool stream = job.stream && job.beta == 0.0 && is_panel<float>(job.grad_x) && std::is_same_v<T, float>;
  const bool in_place = job.beta == 1.0 && need_input && is_panel<T>(job.grad_x) && !job.dropout.active;
  for (int64_t k = 0; k < shape.n; k += plan.columns) {
    const int64_t count = shape.n - k < plan.columns ? shape.n - k : plan.columns, padded = padded_columns<T>(count);
    const int64_t offset = k / plan.columns * plan.block_elements;
    for (int64_t i = 0; i < rows; i += kGroupRows) {
      const int64_t some = rows - i < kGroupRows ? rows - i : kGroupRows;
      const uint32_t* masks[kGroupRows] = {};
      if (job.dropout.active) masks_of_rows(job.dropout, keys, begin + i, some, k, count, mask_row, s.mask, masks);
      for (int64_t t = 0; t < some; t += kTileRows) {
        if (job.need_V) fetch_rows(job.x, begin + i + kGroupRows + t, end, k, count);
        if (need_input && job.beta != 0.0) fetch_rows(job.grad_x, begin + i + kGroupRows + t, end, k, count);
      }
      if (job.need_V)
        for (int64_t t = 0; t < some; ++t)
          pack_row(job.x, begin + i + t, k, count, padded, masks[t], kept_scale, s.panel + (i + t) * plan.leading);
      if (!need_input) continue;
      const Terms<T> V = {static_cast<const T*>(job.V) + offset, r, plan.leading};
      if (in_place && padded == count && some % kTileRows == 0) {
        const int64_t stride = job.grad_x.row_stride;
        T* to = static_cast<T*>(job.grad_x.data) + (begin + i) * stride + k;
        combine<T>(V, {nullptr, 0, 0}, s.coefficients + i * r, some, to, stride, to, stride, count);
        continue;
      }
      combine(V.columns, r, plan.leading, s.coefficients + i * r, some, static_cast<const T*>(nullptr), s.result,
              plan.leading, padded);
      with_storage(job.grad_x, [&](auto* data) {
        for (int64_t t = 0; t < some; ++t) {
          auto* to = data + (begin + i + t) * job.grad_x.row_stride + k * job.grad_x.col_stride;
          T* values = s.result + t * plan.leading;
          if constexpr (std::is_same_v<T, float> && std::is_same_v<decltype(to), float*>) {
            if (stream) {
              if (masks[t])
                for (int64_t c = 0; c < count; ++c) values[c] = kept(values[c] * kept_scale, masks[t][c]);
              stream_row(to, values, count);
              continue;
            }
          }
          add_row(to, job.grad_x.col_stride, values, static_cast<const T*>(nullptr), masks[t], kept_scale, beta, count);
        }
      });
    }
    if (job.need_V) {
      T* sum = static_cast<T*>(sums.V) + offset;
      combine(s.panel, rows, plan.leading, s.other, r, static_cast<const T*>(sum), sum, plan.leading, padded);
    }
  }
#ifdef __SSE2__
  if (stream) _mm_sfence();
#endif
}

void adapter_forward(const AdapterForward& job, int64_t begin, int64_t end) {
  with_adapter_arithmetic(job.shape, [&](auto zero) { forward_rows<decltype(zero)>(job, begin, end); });
}

void adapter_backward(const AdapterBackward& job, int64_t begin, int64_t end, const AdapterSums& sums) {
  with_adapter_arithmetic(job.shape, [&](auto zero) { backward_rows<decltype(zero)>(job, begin, end, sums); });
}

void unpack_factor(const AdapterShape& shape, const AdapterPlan& plan, const void* sums, int64_t groups, int64_t stride,
                   int64_t block, const MatrixView& gradient) {
  with_adapter_arithmetic(shape, [&](auto zero) {
    using T = decltype(zero);
    T* total = scratch().panel.reserve<T>(plan.block_elements);
    const T* from = static_cast<const T*>(sums) + block * plan.block_elements;
    for (int64_t i = 0; i < plan.block_elements; ++i) total[i] = from[i];
    for (int64_t g = 1; g < groups; ++g)
      for (int64_t i = 0; i < plan.block_elements; ++i) total[i] += from[g * stride + i];
    const int64_t begin = block * plan.columns;
    const int64_t count = gradient.n - begin < plan.columns ? gradient.n - begin : plan.columns;
    unpack(total, plan.leading, gradient, begin, count);
  });
}

void unpack_core(const AdapterShape& shape, const AdapterPlan& plan, const void* sums, int64_t groups, int64_t stride,
                 const MatrixView& gradient) {
  with_adapter_arithmetic(shape, [&](auto zero) {
    using T = decltype(zero);
    T* total = scratch().panel.reserve<T>(gradient.n * plan.core_leading);
    const T* from = static_cast<const T*>(sums);
    for (int64_t i = 0; i < gradient.n * plan.core_leading; ++i) {
      total[i] = from[i];
      for (int64_t g = 1; g < groups; ++g) total[i] += from[g * stride + i];
    }
    // Row i of the sums is row i of the gradient: its columns, seen from the transpose.
    const MatrixView transposed = {gradient.data,       gradient.r,          gradient.n,
                                   gradient.col_stride, gradient.row_stride, gradient.storage};
    unpack(total, plan.core_leading, transposed, 0, gradient.r);
  });
}

void dropout_rows(const MatrixView& x, const MatrixView& out, const Dropout& dropout, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 1024;
  const PhiloxKeys keys(dropout.seed);
  uint32_t* buffer = scratch().vectors.reserve<uint32_t>(kColumns + kMaskPadding);
  with_storage(x, [&](auto* data) {
    using S = std::remove_pointer_t<decltype(data)>;
    using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
    const T scale = static_cast<T>(dropout.scale);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t k = 0; k < x.r; k += kColumns) {
        const int64_t count = x.r - k < kColumns ? x.r - k : kColumns;
        const uint32_t* mask = mask_of(dropout, keys, row, k, count, buffer);
        const S* from = data + row * x.row_stride + k * x.col_stride;
        S* to = static_cast<S*>(out.data) + row * out.row_stride + k;
        auto loop = [&](int64_t stride) {
          for (int64_t i = 0; i < count; ++i)
            to[i] = Narrow<S>::from(kept(static_cast<T>(widen(from[i * stride])) * scale, mask[i]));
        };
        x.col_stride == 1 ? loop(1) : loop(x.col_stride);
      }
  });
}

}  // namespace
}  // namespace stella::STELLA_ISA

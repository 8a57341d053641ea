// The interface between the operators and the kernels: plain structs, no torch, one table of functions for each
// instruction set.
#pragma once

#include <cstdint>

namespace stella {

enum class Storage : int { float32, float64, bfloat16, float16 };

constexpr int64_t bytes_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

enum class Method : int { automatic, newton_schulz, svd };

enum class Status : int { ok = 0, non_finite = 1, not_converged = 2, overflow = 3 };

enum class Path : int { newton_schulz = 0, float64_gram = 1, svd = 2 };

// An (n, r) matrix in memory; strides count elements, so a factor stored (r, n) is a view with row_stride 1.
struct MatrixView {
  void* data;
  int64_t n, r, row_stride, col_stride;
  Storage storage;
};

struct Outcome {
  Status status = Status::ok;
  double residual = 0.0;  // bound on ||Q^T Q - I||_F of Q as it was stored: see residual.h
  int iterations = 0;
  Path path = Path::newton_schulz;
  double drift = 0.0;  // ||Y^T Y - I||_F of the Y where the step began; NaN where that was not computed
};

// out = uf(in).
struct PolarJob {
  MatrixView in, out;
  const void* upcoming = nullptr;  // n r elements that this thread will probably read next: fetched meanwhile
  bool stream = false;  // all results together are too large to stay in the cache: write past it where that is possible
};

// moved <- uf(Y + Delta), Delta the tangent projection at Y = previous of (moved - previous) / divisor.
struct RetractJob {
  MatrixView moved, previous;
  double divisor;
};

// gradient <- gradient - Y (gradient^T Y); the factor is copied to the snapshot on the way, where there is one.
struct GradientJob {
  MatrixView gradient, factor;
  MatrixView snapshot;  // data is nullptr: none
};

// The whole Riemannian AdamW step of one factor. All four matrices have one shape; the gradient is read only.
struct AdamwJob {
  MatrixView factor, gradient, first_moment, second_moment;
  double learning_rate, beta1, beta2, epsilon;
  double correction1, correction2;  // 1 - beta^t
  double divisor;                   // of the step: gradient scaling
  double sign;                      // of the gradient: -1 to maximise
  const double* coupling;           // gradient^T factor (r x r), where it is known without a reduction, or nullptr
  // What this thread will probably read next, fetched while the update computes: `upcoming_bytes` each.
  const void* upcoming_factor = nullptr;
  const void* upcoming_gradient = nullptr;
  int64_t upcoming_bytes = 0;
};

// What the kernels do with an (n, r) matrix: shown to people, and used by the kernels themselves.
struct Plan {
  int64_t chunk_rows;                    // rows whose columns are packed side by side at a time
  int64_t block_rows;                    // rows of a unit of work when one matrix is shared between threads
  int gram_rows, gram_columns;           // register tile of the Gram kernel
  int combine_columns, combine_vectors;  // register tile of the update kernel
};

struct AdapterKernels;  // adapter/kernels.h

struct IsaKernels {
  const char* name;
  int vector_bytes;

  Plan (*plan)(int64_t n, int64_t r, Storage storage, bool two_operands);

  void (*polar)(const PolarJob&, Method, Outcome*);
  void (*retract)(const RetractJob&, Method, Outcome*);
  void (*gradient)(const GradientJob&, Outcome*);
  // The largest magnitude in rows [begin, end): infinite where a value is not finite.
  double (*largest_magnitude)(const MatrixView&, int64_t begin, int64_t end);

  // The same in phases, for a matrix shared between threads: Gram of a block of rows into `gram` (order x order
  // float64, order = r or 2r), the small solve, the update of a block of rows. `coefficients` is float64 (order x r).
  void (*polar_gram)(const PolarJob&, int64_t begin, int64_t end, double* gram);
  // An infinite residual after the solve: it has to be measured on the result (`gram` of polar_update, polar_accept).
  bool (*polar_solve)(const PolarJob&, const double* gram, double* coefficients, Outcome*);
  void (*polar_update)(const PolarJob&, int64_t begin, int64_t end, const double* coefficients, double* gram);
  bool (*polar_accept)(const PolarJob&, const double* gram, Outcome*);
  void (*retract_gram)(const RetractJob&, int64_t begin, int64_t end, double* gram);
  bool (*retract_solve)(const RetractJob&, const double* gram, double* coefficients, Outcome*);
  // The same in float64 where that refuses, with a residual that counts the round-off of the Gram: a second retraction
  // takes it away.
  bool (*retract_solve_far)(const RetractJob&, const double* gram, double* coefficients, Outcome*);
  void (*retract_update)(const RetractJob&, int64_t begin, int64_t end, const double* coefficients);
  // gradient^T Y and Y^T Y, side by side in `gram` (2 of r x r).
  void (*gradient_gram)(const GradientJob&, int64_t begin, int64_t end, double* gram);
  // Whether the gradient can be updated; the outcome says why not. `bounded`: not by an orthonormal factor's overflow.
  bool (*gradient_accept)(const GradientJob&, const double* gram, bool bounded, Outcome*);
  void (*gradient_update)(const GradientJob&, int64_t begin, int64_t end, const double* gram);

  void (*adamw)(const AdamwJob&, Outcome*);
  // Whether the step can be taken and its moments stored; the outcome says why not. Nothing is written.
  bool (*adamw_fits)(const AdamwJob&, Outcome*);
  // In phases: gradient^T factor; moments and step (kept in `steps`, of adamw_steps_bytes)
  // with the Gram of [Y, step] (2r x 2r); the solve; the update; and, when the solve refuses, the slow way.
  int64_t (*adamw_steps_bytes)(const AdamwJob&);
  bool (*adamw_steps_by_rows)(const AdamwJob&);  // whether they lie like rows of the factor, or in panels
  void (*adamw_coupling)(const AdamwJob&, int64_t begin, int64_t end, double* coupling);
  void (*adamw_step)(const AdamwJob&, int64_t begin, int64_t end, const double* coupling, void* steps, double* gram);
  bool (*adamw_solve)(const AdamwJob&, const double* gram, double* coefficients, Outcome*);
  void (*adamw_update)(const AdamwJob&, int64_t begin, int64_t end, const void* steps, const double* coefficients);
  void (*adamw_fallback)(const AdamwJob&, const void* steps, Outcome*);

  const AdapterKernels* adapter;
};

// The table of the chosen instruction set (instruction_sets.h).
const IsaKernels& kernels();

}  // namespace stella

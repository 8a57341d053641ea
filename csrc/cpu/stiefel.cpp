// Polar factor, project-and-retract and Riemannian gradient of one matrix. Compiled once per instruction set.
//
// Rows go through in chunks whose columns are packed side by side (panel.h). Two passes over a matrix: Gram blocks,
// then, after an r x r solve in float64, the update. A matrix whose panels fit in the cache is packed once.
#include <type_traits>

#include "kernels.h"
#include "panel.h"
#include "svd_polar.h"

namespace stella::STELLA_ISA {
namespace {

// Past these condition numbers of the Gram matrix its round-off shows in the factor: the Gram's relative error is a
// few units of round-off, and the factor's error is that times the condition number.
constexpr double kFloatConditionLimit = 16.0;
constexpr double kDoubleConditionLimit = 16.0;
constexpr double kWidenedConditionLimit = 1e8;  // float32 data, float64 Gram: 1e8 * 1.1e-16 is below float32's 6e-8

constexpr int64_t kCacheElements = 1 << 16;  // floats of all panels that stay packed between the two passes: 256 KiB

int64_t chunk_rows_for(int64_t order, int64_t n, int element_bytes) {
  int64_t rows = order <= 64 ? 768 : order <= 128 ? 384 : 192;
  if (element_bytes == 8) rows /= 2;
  const int64_t step = kCombineVectors * (STELLA_VECTOR_BYTES / element_bytes);
  rows = round_up(rows, step);
  return n < rows ? round_up(n, STELLA_VECTOR_BYTES / element_bytes) : rows;
}

// Calls body with a zero of the arithmetic type: float64 for float64 storage, float32 for the others.
template <typename Body>
void with_arithmetic(const MatrixView& view, Body&& body) {
  if (view.storage == Storage::float64)
    body(0.0);
  else
    body(0.0f);
}

template <typename T>
constexpr double unit_roundoff() {
  return std::is_same_v<T, float> ? 5.97e-8 : 1.12e-16;
}

// The panels of one or two operands of equal shape, packed chunk by chunk; the first operand's columns come first.
template <typename T>
struct Panels {
  const MatrixView* first;
  const MatrixView* second;  // may be nullptr
  bool difference;           // the second operand is packed as (second - first) * scale, else each times scale
  T scale;
  int64_t begin, end;

  int64_t order, padded_order, chunk, leading, panel_size;
  bool kept;
  bool packed = false;  // every panel is in the storage
  T* storage;

  Panels(const MatrixView* a, const MatrixView* b, bool is_difference, T scale_by, int64_t from, int64_t to)
      : first(a), second(b), difference(is_difference), scale(scale_by), begin(from), end(to) {
    order = b ? 2 * a->r : a->r;
    padded_order = round_up(order, kGramRows);
    chunk = chunk_rows_for(order, to - from, sizeof(T));
    // Not a multiple of the page: columns of a panel must not all fall into the same cache sets.
    leading = chunk % 256 == 0 ? chunk + kLanes<T> : chunk;
    panel_size = padded_order * leading;
    const int64_t chunks = (to - from + chunk - 1) / chunk;
    kept = chunks * panel_size * static_cast<int64_t>(sizeof(T)) <= kCacheElements * 4;
    storage = scratch().panel.reserve<T>((kept ? chunks : 1) * panel_size);
  }

  int64_t rows(int64_t i) const { return end - i < chunk ? end - i : chunk; }
  int64_t padded(int64_t i) const { return round_up(rows(i), kLanes<T>); }

  // The panel of the chunk that starts at row i; packed anew unless an earlier pass left it.
  T* at(int64_t i) const {
    T* panel = storage + (kept ? (i - begin) / chunk * panel_size : 0);
    if (packed) return panel;
    const int64_t r = first->r, count = rows(i), full = padded(i);
    pack(*first, i, count, full, panel, leading, difference ? T(1) : scale);
    if (second) {
      T* other = panel + r * leading;
      pack(*second, i, count, full, other, leading, difference ? T(1) : scale);
      if (difference)
        for (int64_t j = 0; j < r * leading; j += leading)
          for (int64_t k = 0; k < full; ++k) other[j + k] = (other[j + k] - panel[j + k]) * scale;
    }
    for (int64_t j = order * leading; j < panel_size; j += leading)
      for (int64_t k = 0; k < full; ++k) panel[j + k] = T(0);
    return panel;
  }
};

// Upper triangle of the Gram matrix of all packed columns, added to `gram` (order x order).
template <typename T>
void gram_pass(Panels<T>& panels, double* gram) {
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    gram_block(panel, panels.order, panel, panels.order, panels.leading, panels.padded(i), gram, panels.order, true);
  }
  panels.packed = panels.kept;
}

// out <- base + (packed columns from `skip` on) * coefficients, chunk by chunk; the base is the first operand or nothing.
// With `gram`, adds the Gram matrix of what was written.
template <typename T>
void update_pass(const Panels<T>& panels, const double* coefficients, int64_t skip, bool first_is_base,
                 const MatrixView& out, double* gram) {
  const int64_t r = out.r, out_rows = round_up(r, kCombineColumns), terms = panels.order - skip;
  Scratch& s = scratch();
  T* blocked = s.coefficients.reserve<T>(terms * out_rows);
  block_coefficients(coefficients, r, terms, r, blocked);
  T* result = s.output.reserve<T>(out_rows * panels.leading);
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    // The base's columns are padded to four by the panel's rows that follow them; what lands there is never read.
    combine(panel + skip * panels.leading, terms, panels.leading, blocked, r, first_is_base ? panel : nullptr, result,
            panels.leading, panels.padded(i));
    if (gram) gram_block(result, r, result, r, panels.leading, panels.padded(i), gram, r, true);
    unpack(result, panels.leading, out, i, panels.rows(i));
  }
}

// Largest magnitude of the values as bits: integers, since a maximum of integers is vectorised and NaN is one of them.
template <typename Bits>
Bits largest_bits(const void* values, int64_t count, int64_t stride) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;
  const Bits* bits = static_cast<const Bits*>(values);
  Bits largest = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const Bits magnitude = bits[i] & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = bits[i * stride] & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <typename Bits>
bool bits_finite(const MatrixView& view, int64_t begin, int64_t end, Bits infinity) {
  const Bits* from = static_cast<const Bits*>(view.data) + begin * view.row_stride;
  const bool along_rows = view.row_stride == 1;
  const int64_t outer = along_rows ? view.r : end - begin, inner = along_rows ? end - begin : view.r;
  const int64_t outer_stride = along_rows ? view.col_stride : view.row_stride;
  const int64_t inner_stride = along_rows ? 1 : view.col_stride;
  if (inner_stride == 1 && outer_stride == inner) return largest_bits<Bits>(from, outer * inner, 1) < infinity;
  for (int64_t i = 0; i < outer; ++i)
    if (largest_bits<Bits>(from + i * outer_stride, inner, inner_stride) >= infinity) return false;
  return true;
}

bool all_finite(const MatrixView& view, int64_t begin, int64_t end) {
  switch (view.storage) {
    case Storage::float64:
      return bits_finite<uint64_t>(view, begin, end, 0x7ff0000000000000ull);
    case Storage::bfloat16:
      return bits_finite<uint16_t>(view, begin, end, 0x7f80u);
    case Storage::float16:
      return bits_finite<uint16_t>(view, begin, end, 0x7c00u);
    default:
      return bits_finite<uint32_t>(view, begin, end, 0x7f800000u);
  }
}

double largest_magnitude(const MatrixView& view) {
  double largest = 0.0;
  with_storage(view, [&](auto* data) {
    for (int64_t i = 0; i < view.n; ++i)
      for (int64_t j = 0; j < view.r; ++j) {
        const double value = absolute(static_cast<double>(widen(data[i * view.row_stride + j * view.col_stride])));
        if (value > largest) largest = value;
      }
  });
  return largest;
}

// A power of two that brings `largest` near one; two factors, since 2^-e alone can overflow for subnormals.
double power_of_two_scale(double largest) {
  int exponent = 0;
  __builtin_frexp(largest, &exponent);
  return __builtin_ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

double root_of_sum(const double* upper, int64_t r, int64_t leading) {
  double sum = 0.0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i; j < r; ++j) {
      const double e = upper[i * leading + j] - (i == j ? 1.0 : 0.0);
      sum += (i == j ? 1.0 : 2.0) * e * e;
    }
  return __builtin_sqrt(sum);
}

// Full symmetric square with padded leading dimension from the upper triangle of rows and columns [at, at + r).
void symmetric_from_upper(const double* upper, int64_t order, int64_t at, int64_t r, double* full) {
  const int64_t leading = square_leading(r);
  for (int64_t i = 0; i < square_size(r); ++i) full[i] = 0.0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i; j < r; ++j) {
      const double value = upper[(at + i) * order + at + j];
      full[i * leading + j] = value;
      full[j * leading + i] = value;
    }
}

template <typename T>
double solve_tolerance() {
  return std::is_same_v<T, float> ? 1e-9 : 1e-15;
}

// What a residual may be: the round-off of r columns of unit length, with room for the condition limit above.
template <typename T>
double residual_limit(int64_t r) {
  return 64.0 * unit_roundoff<T>() * __builtin_sqrt(static_cast<double>(r));
}

double* zeroed_gram(int64_t order) {
  double* gram = scratch().gram.reserve<double>(order * order);
  for (int64_t i = 0; i < order * order; ++i) gram[i] = 0.0;
  return gram;
}

// ---- polar factor ----------------------------------------------------------------------------------------------

// coefficients (r x r) = G^(-1/2) from the Gram's upper triangle.
bool polar_coefficients(const double* gram, int64_t r, double tolerance, double limit, double* coefficients,
                        Outcome* outcome) {
  Scratch& s = scratch();
  const int64_t leading = square_leading(r);
  double* G = s.square[4].reserve<double>(square_size(r));
  double* R = s.square[5].reserve<double>(square_size(r));
  symmetric_from_upper(gram, r, 0, r, G);
  const SmallResult result = inverse_square_root(G, r, tolerance, R);
  outcome->iterations += result.iterations;
  if (!result.converged || !(result.condition <= limit)) return false;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) coefficients[i * r + j] = R[i * leading + j];
  return true;
}

// Neither overflow nor underflow has touched the Gram: its diagonal lies well inside the arithmetic type's range.
template <typename T>
bool gram_in_range(const double* gram, int64_t r) {
  const double high = std::is_same_v<T, float> ? 1e36 : 1e300, low = std::is_same_v<T, float> ? 1e-24 : 1e-240;
  double largest = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    const double g = gram[i * r + i];
    if (!(g <= high)) return false;
    if (g > largest) largest = g;
  }
  return largest >= low;
}

template <typename T>
bool polar_newton_schulz(const PolarJob& job, T scale, double limit, Outcome* outcome) {
  const int64_t n = job.in.n, r = job.in.r;
  double* gram = zeroed_gram(r);
  Panels<T> panels(&job.in, nullptr, false, scale, 0, n);
  gram_pass(panels, gram);
  if (!gram_in_range<T>(gram, r)) return false;
  Buffer small;
  double* coefficients = small.reserve<double>(r * r);
  if (!polar_coefficients(gram, r, solve_tolerance<T>(), limit, coefficients, outcome)) return false;
  gram = zeroed_gram(r);
  update_pass(panels, coefficients, 0, false, job.out, gram);
  outcome->residual = root_of_sum(gram, r, r);
  return outcome->residual <= residual_limit<T>(r);
}

bool svd_to(double* columns, const MatrixView& out, Outcome* outcome) {
  const int64_t n = out.n, r = out.r;
  Buffer factor;
  double* Q = factor.reserve<double>(n * r);
  outcome->path = Path::svd;
  if (!svd_polar(columns, n, r, Q, &outcome->iterations)) {
    outcome->status = Status::not_converged;
    return false;
  }
  unpack(Q, n, out, 0, n);
  double* gram = zeroed_gram(r);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = i; j < r; ++j) gram[i * r + j] = dot(Q + i * n, Q + j * n, n);
  outcome->residual = root_of_sum(gram, r, r);
  return true;
}

void polar_by_svd(const PolarJob& job, double scale, Outcome* outcome) {
  Buffer tall;
  double* columns = tall.reserve<double>(job.in.n * job.in.r);
  pack<double>(job.in, 0, job.in.n, job.in.n, columns, job.in.n, scale);
  svd_to(columns, job.out, outcome);
}

void polar(const PolarJob& job, Method method, Outcome* outcome) {
  const int64_t n = job.in.n, r = job.in.r;
  *outcome = Outcome();
  if (n == 0 || r == 0) return;
  const bool wide = job.in.storage == Storage::float64;
  const double no_limit = 1e300;
  const bool automatic = method == Method::automatic;
  if (method != Method::svd) {
    const bool done = wide ? polar_newton_schulz<double>(job, 1.0, automatic ? kDoubleConditionLimit : no_limit, outcome)
                           : polar_newton_schulz<float>(job, 1.0f, kFloatConditionLimit, outcome);
    if (done) return;
  }
  // Off the fast path: look at the data, scale it into range, work in float64.
  if (!all_finite(job.in, 0, n)) {
    outcome->status = Status::non_finite;
    outcome->residual = __builtin_nan("");
    return;
  }
  const double largest = largest_magnitude(job.in);
  const double scale = largest > 0.0 ? power_of_two_scale(largest) : 1.0;
  if (method != Method::svd && largest > 0.0) {
    outcome->path = Path::float64_gram;
    const double limit = !automatic ? no_limit : wide ? kDoubleConditionLimit : kWidenedConditionLimit;
    if (polar_newton_schulz<double>(job, scale, limit, outcome)) return;
  }
  if (method == Method::newton_schulz) {
    outcome->status = Status::not_converged;
    return;
  }
  polar_by_svd(job, scale, outcome);
}

void polar_gram(const PolarJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.in, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.in, nullptr, false, 1, begin, end);
    gram_pass(panels, gram);
  });
}

bool polar_solve(const PolarJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  if (job.in.storage == Storage::float64)
    return gram_in_range<double>(gram, job.in.r) &&
           polar_coefficients(gram, job.in.r, solve_tolerance<double>(), kDoubleConditionLimit, coefficients, outcome);
  return gram_in_range<float>(gram, job.in.r) &&
         polar_coefficients(gram, job.in.r, solve_tolerance<float>(), kFloatConditionLimit, coefficients, outcome);
}

void polar_update(const PolarJob& job, int64_t begin, int64_t end, const double* coefficients, double* gram) {
  with_arithmetic(job.in, [&](auto zero) {
    const Panels<decltype(zero)> panels(&job.in, nullptr, false, 1, begin, end);
    update_pass(panels, coefficients, 0, false, job.out, gram);
  });
}

bool polar_accept(const PolarJob& job, const double* gram, Outcome* outcome) {
  outcome->residual = root_of_sum(gram, job.in.r, job.in.r);
  return outcome->residual <= (job.in.storage == Storage::float64 ? residual_limit<double>(job.in.r)
                                                                   : residual_limit<float>(job.in.r));
}

// ---- project and retract ---------------------------------------------------------------------------------------

// From the Gram of [Y, Delta], blocks C = Y^T Y, A = Y^T Delta, D = Delta^T Delta: B = I - symm(A), the Gram of
// M = Y B + Delta as G = B^T C B + B A + A^T B + D, R = G^(-1/2). The new factor is Y (B R) + Delta R; the
// coefficients (2r x r) are [B R - I; R], to be added to Y, so that round-off scales with the step and not with Y.
bool retract_coefficients(const double* gram, int64_t r, double tolerance, double limit, double* coefficients,
                          Outcome* outcome) {
  const int64_t order = 2 * r, leading = square_leading(r), size = square_size(r);
  Buffer small;
  double* C = small.reserve<double>(4 * size);
  double* A = C + size;
  double* B = A + size;
  double* P = B + size;
  Scratch& s = scratch();
  double* G = s.square[4].reserve<double>(size);
  double* R = s.square[5].reserve<double>(size);
  symmetric_from_upper(gram, order, 0, r, C);
  symmetric_from_upper(gram, order, r, r, G);  // D
  for (int64_t i = 0; i < size; ++i) A[i] = B[i] = 0.0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) A[i * leading + j] = gram[i * order + r + j];
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j)
      B[i * leading + j] = (i == j ? 1.0 : 0.0) - 0.5 * (A[i * leading + j] + A[j * leading + i]);
  multiply(B, A, r, P);  // B^T A = B A
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) G[i * leading + j] += P[i * leading + j] + P[j * leading + i];
  multiply(C, B, r, P);  // C B
  multiply(B, P, r, A);  // B C B
  for (int64_t i = 0; i < size; ++i) G[i] += A[i];
  const SmallResult result = inverse_square_root(G, r, tolerance, R);
  outcome->iterations += result.iterations;
  outcome->residual = result.residual;
  if (!result.converged || !(result.condition <= limit)) return false;
  multiply(B, R, r, P);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) {
      coefficients[i * r + j] = P[i * leading + j] - (i == j ? 1.0 : 0.0);
      coefficients[(r + i) * r + j] = R[i * leading + j];
    }
  return true;
}

template <typename T>
bool retract_newton_schulz(const RetractJob& job, double limit, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  double* gram = zeroed_gram(2 * r);
  Panels<T> panels(&job.previous, &job.moved, true, static_cast<T>(1.0 / job.divisor), 0, n);
  gram_pass(panels, gram);
  Buffer small;
  double* coefficients = small.reserve<double>(2 * r * r);
  if (!retract_coefficients(gram, r, solve_tolerance<T>(), limit, coefficients, outcome)) return false;
  update_pass(panels, coefficients, 0, true, job.moved, nullptr);
  return true;
}

// M = Y B + Delta itself, scaled into range, then its polar factor by SVD.
void retract_by_svd(const RetractJob& job, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  Buffer tall, small;
  double* Y = tall.reserve<double>(2 * n * r);
  double* D = Y + n * r;
  pack<double>(job.previous, 0, n, n, Y, n, 1.0);
  pack<double>(job.moved, 0, n, n, D, n, 1.0);
  double* A = small.reserve<double>(r * r);
  double largest = 1.0;
  for (int64_t k = 0; k < n * r; ++k) {
    D[k] = D[k] / job.divisor - Y[k] / job.divisor;
    if (absolute(D[k]) > largest) largest = absolute(D[k]);
  }
  const double scale = power_of_two_scale(largest);  // uf(c M) = uf(M): the whole of M is formed scaled
  for (int64_t k = 0; k < n * r; ++k) D[k] *= scale;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) A[i * r + j] = dot(Y + i * n, D + j * n, n);
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = 0; i < r; ++i)
      add_scaled(D + j * n, Y + i * n, (i == j ? scale : 0.0) - 0.5 * (A[i * r + j] + A[j * r + i]), n);
  svd_to(D, job.moved, outcome);
}

void retract(const RetractJob& job, Method method, Outcome* outcome) {
  const int64_t n = job.moved.n, r = job.moved.r;
  *outcome = Outcome();
  if (n == 0 || r == 0) return;
  const bool wide = job.moved.storage == Storage::float64;
  const double no_limit = 1e300;
  const bool automatic = method == Method::automatic;
  if (method != Method::svd) {
    const bool done = wide ? retract_newton_schulz<double>(job, automatic ? kDoubleConditionLimit : no_limit, outcome)
                           : retract_newton_schulz<float>(job, kFloatConditionLimit, outcome);
    if (done) return;
  }
  if (!all_finite(job.moved, 0, n) || !all_finite(job.previous, 0, n)) {
    outcome->status = Status::non_finite;
    outcome->residual = __builtin_nan("");
    return;
  }
  if (method != Method::svd && !wide) {
    outcome->path = Path::float64_gram;
    if (retract_newton_schulz<double>(job, automatic ? kWidenedConditionLimit : no_limit, outcome)) return;
  }
  if (method == Method::newton_schulz) {
    outcome->status = Status::not_converged;
    return;
  }
  retract_by_svd(job, outcome);
}

void retract_gram(const RetractJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.moved, [&](auto zero) {
    using T = decltype(zero);
    Panels<T> panels(&job.previous, &job.moved, true, static_cast<T>(1.0 / job.divisor), begin, end);
    gram_pass(panels, gram);
  });
}

bool retract_solve(const RetractJob& job, const double* gram, double* coefficients, Outcome* outcome) {
  if (job.moved.storage == Storage::float64)
    return retract_coefficients(gram, job.moved.r, solve_tolerance<double>(), kDoubleConditionLimit, coefficients,
                                outcome);
  return retract_coefficients(gram, job.moved.r, solve_tolerance<float>(), kFloatConditionLimit, coefficients, outcome);
}

void retract_update(const RetractJob& job, int64_t begin, int64_t end, const double* coefficients) {
  with_arithmetic(job.moved, [&](auto zero) {
    using T = decltype(zero);
    const Panels<T> panels(&job.previous, &job.moved, true, static_cast<T>(1.0 / job.divisor), begin, end);
    update_pass(panels, coefficients, 0, true, job.moved, nullptr);
  });
}

// ---- Riemannian gradient ---------------------------------------------------------------------------------------

// K = gradient^T Y, added to `gram` (r x r).
template <typename T>
void cross_pass(Panels<T>& panels, double* gram) {
  const int64_t r = panels.first->r;
  for (int64_t i = panels.begin; i < panels.end; i += panels.chunk) {
    const T* panel = panels.at(i);
    gram_block(panel, r, panel + r * panels.leading, r, panels.leading, panels.padded(i), gram, r, false);
  }
  panels.packed = panels.kept;
}

// gradient += Y (-K): turns K into coefficients in place.
template <typename T>
void subtract_pass(const Panels<T>& panels, const MatrixView& gradient, const double* gram) {
  const int64_t r = gradient.r;
  Buffer small;
  double* coefficients = small.reserve<double>(r * r);
  for (int64_t i = 0; i < r * r; ++i) coefficients[i] = -gram[i];
  update_pass(panels, coefficients, r, true, gradient, nullptr);
}

void gradient(const GradientJob& job) {
  if (job.gradient.n == 0 || job.gradient.r == 0) return;
  with_arithmetic(job.gradient, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, 0, job.gradient.n);
    double* gram = zeroed_gram(job.gradient.r);
    cross_pass(panels, gram);
    subtract_pass(panels, job.gradient, gram);
  });
}

void gradient_gram(const GradientJob& job, int64_t begin, int64_t end, double* gram) {
  with_arithmetic(job.gradient, [&](auto zero) {
    Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, begin, end);
    cross_pass(panels, gram);
  });
}

void gradient_update(const GradientJob& job, int64_t begin, int64_t end, const double* gram) {
  with_arithmetic(job.gradient, [&](auto zero) {
    const Panels<decltype(zero)> panels(&job.gradient, &job.factor, false, 1, begin, end);
    subtract_pass(panels, job.gradient, gram);
  });
}

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

}  // namespace

#define STELLA_STRING_OF(x) #x
#define STELLA_STRING(x) STELLA_STRING_OF(x)

const IsaKernels& table() {
  static const IsaKernels kernels = {
      STELLA_STRING(STELLA_ISA), STELLA_VECTOR_BYTES, plan,          polar,          retract,
      gradient,                  all_finite,          polar_gram,    polar_solve,    polar_update,
      polar_accept,              retract_gram,        retract_solve, retract_update, gradient_gram,
      gradient_update};
  return kernels;
}

}  // namespace stella::STELLA_ISA

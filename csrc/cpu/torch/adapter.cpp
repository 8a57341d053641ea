// The adapter's operators under torch's dispatcher, on the stable ABI.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "adapter/schedule.h"
#include "signatures.h"
#include "torch/arguments.h"
#include "torch/bindings.h"

namespace {

using namespace stella::bindings;
using stella::MatrixView;
namespace signatures = stella::signatures;

// S as (r, r), or a diagonal one as (1, r).
MatrixView core_of(const Tensor& S, int64_t r, const Argument& a) {
  const bool diagonal = S.dim() == 1;
  STD_TORCH_CHECK((diagonal || (S.dim() == 2 && S.size(1) == r)) && S.size(0) == r, a, "found ", shape_of(S),
                  ", wanted (", r, ", ", r, "), or (", r, ",) when it is diagonal, to go with U.");
  if (!diagonal) return matrix_of(S, a);
  check_in_memory(S, a);
  return {data_of(S), 1, r, 0, S.stride(0), storage_of(S, a)};
}

stella::AdapterFactors factors_of(const char* op, const Tensor& U, const Tensor& S, const Tensor& Vt) {
  stella::AdapterFactors factors = {matrix_of(U, {op, "U"}), matrix_of(Vt, {op, "Vt"}, true), {}, S.dim() == 1};
  STD_TORCH_CHECK(factors.U.r == factors.V.r, Argument{op, "Vt"}, "found ", shape_of(Vt), ", wanted (r, n) with U's ",
                  "rank r = ", factors.U.r, "; if this is V, pass V.mT.");
  factors.core = core_of(S, factors.U.r, {op, "S"});
  return factors;
}

void read_factors(Memory& memory, const char* op, const stella::AdapterFactors& factors) {
  memory.read(factors.U, {op, "U"});
  memory.read(factors.core, {op, "S"});
  memory.read(factors.V, {op, "Vt"});
}

stella::Dropout dropout_of(const char* op, double p, const std::optional<Tensor>& seed) {
  stella::Dropout dropout;
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, Argument{op, "p"}, "found ", p, ", wanted a probability in [0, 1].");
  if (p == 0.0) return dropout;
  STD_TORCH_CHECK(seed.has_value(), Argument{op, "seed"},
                  "found None, wanted an int64 scalar tensor beside a dropout.");
  STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(), Argument{op, "seed"},
                  "found ", shape_of(*seed), ", ", dtype_of(*seed),
                  ", wanted an int64 scalar tensor on the CPU beside a dropout.");
  dropout.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  constexpr uint64_t kLevels = 1 << 16;  // as in reference/philox.py
  const uint64_t nearest = static_cast<uint64_t>(std::nearbyint(p * static_cast<double>(kLevels)));
  dropout.threshold = p == 1.0 ? kLevels : std::min(nearest, kLevels - 1);
  dropout.scale = static_cast<double>(kLevels) / static_cast<double>(kLevels - dropout.threshold);
  dropout.active = true;
  return dropout;
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

MatrixView rows_of(const Tensor& t, const Argument& a, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, a, "found ", shape_of(t), ", wanted (",
                  rows, ", ", columns, "), to go with x, U and Vt.");
  return matrix_of(t, a);
}

// y (+)= s d(x) V S^T U^T into `y`; returns A of y's dtype. `Arguments` has the layer's, by the same names.
template <typename Arguments>
Tensor forward_into(const Tensor& y, const std::optional<Tensor>& bias, bool accumulate, const Arguments& a) {
  const stella::AdapterFactors factors = factors_of(a.op, a.U, a.S, a.Vt);
  const int64_t m = factors.U.n, n = factors.V.n, r = factors.U.r;
  stella::AdapterForward job = {};
  job.x = matrix_of(a.x, {a.op, "x"});
  job.x = rows_of(a.x, {a.op, "x"}, job.x.n, n);
  job.y = rows_of(y, {a.op, "y"}, job.x.n, m);
  job.shape = {job.x.n, m, n, r, job.y.storage == stella::Storage::float64};
  if (bias) {
    const Argument b = {a.op, "b"};
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == m, b, "found ", shape_of(*bias),
                    ", wanted (", m, ",) on the CPU, one for each row of U.");
    check_in_memory(*bias, b);
    job.bias = {data_of(*bias), 1, m, 0, bias->stride(0), storage_of(*bias, b)};
  }
  job.dropout = dropout_of(a.op, a.p, a.seed);
  if (accumulate) {
    Memory memory;
    memory.written(job.y, {a.op, "y"});
    memory.read(job.x, {a.op, "x"});
    read_factors(memory, a.op, factors);
    memory.check();
  }
  Tensor A = torch::stable::new_empty(y, {job.shape.T, r});
  job.A = matrix_of(A, {a.op, "A"});
  job.accumulate = accumulate;
  job.stream = bytes_of(y) >= kStreamedBytes;
  job.scale = a.scale;
  if (job.shape.T > 0) stella::adapter_forward(pool(), job, factors);
  return A;
}

Tensor adapter_forward_(const signatures::AdapterForward& a) { return forward_into(a.y, std::nullopt, true, a); }

std::tuple<Tensor, Tensor> adapter_product(const signatures::AdapterProduct& a) {
  const int64_t T = matrix_of(a.x, {a.op, "x"}).n, m = matrix_of(a.U, {a.op, "U"}).n;
  const Tensor y = torch::stable::new_empty(a.x, {T, m});
  prefer_huge_pages(data_of(y), bytes_of(y));
  const Tensor A = forward_into(y, a.b, false, a);
  return {y, A};
}

std::tuple<Tensor, Tensor, Tensor> adapter_backward_(const signatures::AdapterBackward& a) {
  STD_TORCH_CHECK(a.needed.size() == 3, Argument{a.op, "needed"}, "found ", a.needed.size(),
                  " flags, wanted three, for U, S and Vt.");
  const stella::AdapterFactors factors = factors_of(a.op, a.U, a.S, a.Vt);
  const int64_t m = factors.U.n, n = factors.V.n, r = factors.U.r;
  stella::AdapterBackward job = {};
  job.x = matrix_of(a.x, {a.op, "x"});
  const int64_t T = job.x.n;
  job.x = rows_of(a.x, {a.op, "x"}, T, n);
  job.grad_y = rows_of(a.grad_y, {a.op, "grad_y"}, T, m);
  job.A = rows_of(a.A, {a.op, "A"}, T, r);
  job.shape = {T, m, n, r, job.grad_y.storage == stella::Storage::float64};
  job.dropout = dropout_of(a.op, a.p, a.seed);
  if (a.grad_x) {
    job.grad_x = rows_of(*a.grad_x, {a.op, "grad_x"}, T, n);
    Memory memory;
    memory.written(job.grad_x, {a.op, "grad_x"});
    memory.read(job.grad_y, {a.op, "grad_y"});
    memory.read(job.x, {a.op, "x"});
    memory.read(job.A, {a.op, "A"});
    read_factors(memory, a.op, factors);
    memory.check();
    job.stream = bytes_of(*a.grad_x) >= kStreamedBytes;
    if (a.beta == 0.0) prefer_huge_pages(data_of(*a.grad_x), bytes_of(*a.grad_x));
  }
  job.beta = a.beta;
  job.need_U = a.needed[0];
  job.need_S = a.needed[1];
  job.need_V = a.needed[2];
  job.scale = a.scale;

  Tensor grad_U = job.need_U ? torch::stable::new_empty(a.U, {m, r}) : torch::stable::new_empty(a.U, {0});
  Tensor grad_Vt = job.need_V ? torch::stable::new_empty(a.Vt, {r, n}) : torch::stable::new_empty(a.Vt, {0});
  Tensor grad_S = !job.need_S        ? torch::stable::new_empty(a.S, {0})
                  : factors.diagonal ? torch::stable::new_empty(a.S, {r})
                                     : torch::stable::new_empty(a.S, {r, r});
  stella::AdapterFactors gradients = {};
  if (job.need_U) gradients.U = matrix_of(grad_U, {a.op, "U"});
  if (job.need_V) gradients.V = matrix_of(grad_Vt, {a.op, "Vt"}, true);
  if (job.need_S) gradients.core = core_of(grad_S, r, {a.op, "S"});
  stella::adapter_backward(pool(), job, factors, gradients);
  return {grad_U, grad_S, grad_Vt};
}

Tensor philox_dropout(const signatures::PhiloxDropout& a) {
  const Tensor& x = a.x;
  const Argument argument = {a.op, "x"};
  storage_of(x, argument);
  const stella::Dropout dropout = dropout_of(a.op, a.p, a.seed);
  std::vector<int64_t> shape(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) shape[d] = x.size(d);
  const Tensor out = torch::stable::new_empty(x, shape);
  if (x.numel() == 0) return out;
  prefer_huge_pages(data_of(out), bytes_of(out));
  const Tensor flat = x.dim() == 2 ? x : torch::stable::reshape(x, {-1, x.dim() > 0 ? x.size(x.dim() - 1) : 1});
  const Tensor rows = out.dim() == 2 ? out : torch::stable::view(out, {flat.size(0), flat.size(1)});
  stella::philox_dropout(pool(), matrix_of(flat, argument), matrix_of(rows, argument), dropout);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stella_kernels, CPU, m) {
  m.impl("philox_dropout", TORCH_BOX(&signatures::philox_dropout<philox_dropout>));
  m.impl("adapter_forward_", TORCH_BOX(&signatures::adapter_forward_<adapter_forward_>));
  m.impl("adapter_product", TORCH_BOX(&signatures::adapter_product<adapter_product>));
  m.impl("adapter_backward_", TORCH_BOX(&signatures::adapter_backward_<adapter_backward_>));
}

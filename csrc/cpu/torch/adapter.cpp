// The adapter's operators under torch's dispatcher, on the stable ABI.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "adapter/schedule.h"
#include "signatures.h"
#include "torch/bindings.h"

namespace {

using namespace stella::bindings;
using stella::MatrixView;
namespace signatures = stella::signatures;

// (rows, columns) as it is, or seen from its transpose.
MatrixView view_of(const Tensor& t, const char* argument, bool transposed = false) {
  STD_TORCH_CHECK(t.dim() == 2, argument, ": wanted a matrix, found ", t.dim(), " dimensions.");
  const int row = transposed ? 1 : 0, column = 1 - row;
  return {data_of(t), t.size(row), t.size(column), t.stride(row), t.stride(column), storage_of(t, argument)};
}

// S as (r, r), or a diagonal one as (1, r).
MatrixView core_of(const Tensor& S, int64_t r, const char* argument) {
  if (S.dim() == 1) {
    STD_TORCH_CHECK(S.size(0) == r, argument, ": wanted (r, r), or (r,) when it is diagonal.");
    return {data_of(S), 1, r, 0, S.stride(0), storage_of(S, argument)};
  }
  const MatrixView view = view_of(S, argument);
  STD_TORCH_CHECK(view.n == r && view.r == r, argument, ": wanted (r, r), or (r,) when it is diagonal.");
  return view;
}

stella::AdapterFactors factors_of(const Tensor& U, const Tensor& S, const Tensor& Vt) {
  stella::AdapterFactors factors = {view_of(U, "U"), view_of(Vt, "Vt", true), {}, S.dim() == 1};
  STD_TORCH_CHECK(factors.U.r == factors.V.r, "Vt: wanted (r, n) with U's rank.");
  factors.core = core_of(S, factors.U.r, "S");
  return factors;
}

stella::Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  stella::Dropout dropout;
  if (p == 0.0) return dropout;
  STD_TORCH_CHECK(p > 0.0 && p <= 1.0, "p: wanted a probability in [0, 1].");
  STD_TORCH_CHECK(seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->is_cpu(),
                  "seed: wanted an int64 scalar tensor on the CPU beside a dropout.");
  dropout.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  dropout.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  dropout.scale = 1.0 / (1.0 - p);
  dropout.active = true;
  return dropout;
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

void check_rows(const MatrixView& a, int64_t rows, int64_t columns, const char* argument) {
  STD_TORCH_CHECK(a.n == rows && a.r == columns, argument, ": found ", a.n, " x ", a.r, ", wanted ", rows, " x ",
                  columns, ".");
}

// y (+)= s d(x) V S^T U^T into `y`; returns A of y's dtype. `Arguments` has the layer's, by the same names.
template <typename Arguments>
Tensor forward_into(const Tensor& y, const std::optional<Tensor>& bias, bool accumulate, const Arguments& a) {
  const stella::AdapterFactors factors = factors_of(a.U, a.S, a.Vt);
  stella::AdapterForward job = {};
  job.x = view_of(a.x, "x");
  job.y = view_of(y, "y");
  job.shape = {job.x.n, factors.U.n, factors.V.n, factors.U.r, job.y.storage == stella::Storage::float64};
  check_rows(job.x, job.shape.T, job.shape.n, "x");
  check_rows(job.y, job.shape.T, job.shape.m, "y");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == job.shape.m, "b: wanted (m,).");
    job.bias = {data_of(*bias), 1, job.shape.m, 0, bias->stride(0), storage_of(*bias, "b")};
  }
  Tensor A = torch::stable::new_empty(y, {job.shape.T, job.shape.r});
  job.A = view_of(A, "A");
  job.accumulate = accumulate;
  job.stream = bytes_of(y) >= kStreamedBytes;
  job.scale = a.scale;
  job.dropout = dropout_of(a.p, a.seed);
  if (job.shape.T > 0) stella::adapter_forward(pool(), job, factors);
  return A;
}

Tensor adapter_forward_(const signatures::AdapterForward& a) { return forward_into(a.y, std::nullopt, true, a); }

std::tuple<Tensor, Tensor> adapter_product(const signatures::AdapterProduct& a) {
  STD_TORCH_CHECK(a.x.dim() == 2 && a.U.dim() == 2, "x, U: wanted matrices.");
  const Tensor y = torch::stable::new_empty(a.x, {a.x.size(0), a.U.size(0)});
  prefer_huge_pages(data_of(y), bytes_of(y));
  const Tensor A = forward_into(y, a.b, false, a);
  return {y, A};
}

std::tuple<Tensor, Tensor, Tensor> adapter_backward_(const signatures::AdapterBackward& a) {
  STD_TORCH_CHECK(a.needed.size() == 3, "needed: wanted three flags, for U, S and Vt.");
  const stella::AdapterFactors factors = factors_of(a.U, a.S, a.Vt);
  stella::AdapterBackward job = {};
  job.grad_y = view_of(a.grad_y, "grad_y");
  job.x = view_of(a.x, "x");
  job.A = view_of(a.A, "A");
  job.shape = {job.grad_y.n, factors.U.n, factors.V.n, factors.U.r, job.grad_y.storage == stella::Storage::float64};
  check_rows(job.grad_y, job.shape.T, job.shape.m, "grad_y");
  check_rows(job.x, job.shape.T, job.shape.n, "x");
  check_rows(job.A, job.shape.T, job.shape.r, "A");
  if (a.grad_x) {
    job.grad_x = view_of(*a.grad_x, "grad_x");
    check_rows(job.grad_x, job.shape.T, job.shape.n, "grad_x");
    job.stream = bytes_of(*a.grad_x) >= kStreamedBytes;
    if (a.beta == 0.0) prefer_huge_pages(data_of(*a.grad_x), bytes_of(*a.grad_x));
  }
  job.beta = a.beta;
  job.need_U = a.needed[0];
  job.need_S = a.needed[1];
  job.need_V = a.needed[2];
  job.scale = a.scale;
  job.dropout = dropout_of(a.p, a.seed);

  const int64_t m = job.shape.m, n = job.shape.n, r = job.shape.r;
  Tensor grad_U = job.need_U ? torch::stable::new_empty(a.U, {m, r}) : torch::stable::new_empty(a.U, {0});
  Tensor grad_Vt = job.need_V ? torch::stable::new_empty(a.Vt, {r, n}) : torch::stable::new_empty(a.Vt, {0});
  Tensor grad_S = !job.need_S        ? torch::stable::new_empty(a.S, {0})
                  : factors.diagonal ? torch::stable::new_empty(a.S, {r})
                                     : torch::stable::new_empty(a.S, {r, r});
  stella::AdapterFactors gradients = {};
  if (job.need_U) gradients.U = view_of(grad_U, "U");
  if (job.need_V) gradients.V = view_of(grad_Vt, "Vt", true);
  if (job.need_S) gradients.core = core_of(grad_S, r, "S");
  stella::adapter_backward(pool(), job, factors, gradients);
  return {grad_U, grad_S, grad_Vt};
}

Tensor philox_dropout(const signatures::PhiloxDropout& a) {
  const Tensor& x = a.x;
  std::vector<int64_t> shape(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) shape[d] = x.size(d);
  const Tensor out = torch::stable::new_empty(x, shape);
  if (x.numel() == 0) return out;
  prefer_huge_pages(data_of(out), bytes_of(out));
  const Tensor flat = x.dim() == 2 ? x : torch::stable::reshape(x, {-1, x.dim() > 0 ? x.size(x.dim() - 1) : 1});
  const Tensor rows = out.dim() == 2 ? out : torch::stable::view(out, {flat.size(0), flat.size(1)});
  stella::Dropout dropout = dropout_of(a.p, a.seed);
  stella::philox_dropout(pool(), view_of(flat, "x"), view_of(rows, "x"), dropout);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stella_kernels, CPU, m) {
  m.impl("philox_dropout", TORCH_BOX(&signatures::philox_dropout<philox_dropout>));
  m.impl("adapter_forward_", TORCH_BOX(&signatures::adapter_forward_<adapter_forward_>));
  m.impl("adapter_product", TORCH_BOX(&signatures::adapter_product<adapter_product>));
  m.impl("adapter_backward_", TORCH_BOX(&signatures::adapter_backward_<adapter_backward_>));
}

// The CPU kernels under torch's dispatcher, on the stable ABI: no at:: or c10:: symbol, so a wheel outlives a release.
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "signatures.h"
#include "torch/arguments.h"
#include "torch/bindings.h"

namespace {

using namespace stella::bindings;
namespace signatures = stella::signatures;

stella::Method method_of(const char* op, const std::string& name) {
  if (name == "auto") return stella::Method::automatic;
  if (name == "newton_schulz") return stella::Method::newton_schulz;
  if (name == "svd") return stella::Method::svd;
  STD_TORCH_CHECK(false, Argument{op, "method"}, "found '", name, "', wanted 'auto', 'newton_schulz' or 'svd'.");
}

// An (r, r) tensor as float64, row-major.
std::vector<double> square_of(const Tensor& t, const Argument& a, int64_t r) {
  const bool narrow = t.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == r && t.size(1) == r &&
                      (narrow || t.scalar_type() == ScalarType::Double),
                  a, "found ", shape_of(t), ", ", dtype_of(t), ", wanted (", r, ", ", r,
                  "), float32 or float64 on the CPU, or an empty tensor.");
  std::vector<double> square(r * r);
  for (int64_t a = 0; a < r; ++a)
    for (int64_t b = 0; b < r; ++b) {
      const int64_t at = a * t.stride(0) + b * t.stride(1);
      square[a * r + b] =
          narrow ? static_cast<const float*>(data_of(t))[at] : static_cast<const double*>(data_of(t))[at];
    }
  return square;
}

std::tuple<Tensor, Tensor> polar(const signatures::Polar& a) {
  const Tensor& M = a.M;
  const int64_t dims = M.dim();
  const Argument argument = {a.op, "M"};
  STD_TORCH_CHECK(dims >= 2 && M.size(dims - 2) >= M.size(dims - 1), argument, "found ", shape_of(M),
                  ", wanted (..., n, r) with n >= r; pass a factor that is stored transposed as its .mT view.");
  check_in_memory(M, argument);
  const stella::Storage storage = storage_of(M, argument);
  const stella::Method method = method_of(a.op, a.method);
  // Read once: each is a call into torch.
  std::vector<int64_t> shape(dims), strides(dims), index(dims - 2, 0);
  int64_t batch = 1;
  for (int64_t d = 0; d < dims; ++d) {
    shape[d] = M.size(d);
    strides[d] = M.stride(d);
    if (d < dims - 2) batch *= shape[d];
  }
  Tensor Q = torch::stable::new_empty(M, shape);
  const int64_t n = shape[dims - 2], r = shape[dims - 1], row_stride = strides[dims - 2],
                col_stride = strides[dims - 1];
  const int64_t bytes = static_cast<int64_t>(M.element_size());
  char* in = static_cast<char*>(data_of(M));
  char* out = static_cast<char*>(data_of(Q));
  prefer_huge_pages(out, batch * n * r * bytes);
  const bool stream = batch * n * r * bytes >= kStreamedBytes;
  std::vector<stella::PolarJob> jobs;
  jobs.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t offset = 0;
    for (int64_t d = 0; d < dims - 2; ++d) offset += index[d] * strides[d];
    jobs.push_back({{in + offset * bytes, n, r, row_stride, col_stride, storage},
                    {out + b * n * r * bytes, n, r, r, 1, storage},
                    nullptr,
                    stream});
    for (int64_t d = dims - 3; d >= 0 && ++index[d] == shape[d]; --d) index[d] = 0;
  }
  // Threads take the matrices in turn, so the one after next is this thread's.
  const int64_t threads = pool().threads;
  if (col_stride == 1 && row_stride == r)
    for (int64_t b = 0; b + threads < batch; ++b) jobs[b].upcoming = jobs[b + threads].in.data;
  const std::vector<stella::Outcome> outcomes = stella::polar(pool(), jobs, method);
  for (size_t b = 0; b < outcomes.size(); ++b) {
    STD_TORCH_CHECK(outcomes[b].status != stella::Status::non_finite, "polar: matrix ", b,
                    " of M holds NaN or an infinity; the orthogonal polar factor is not defined for it. "
                    "Check the values that were passed in.");
    STD_TORCH_CHECK(outcomes[b].status != stella::Status::not_converged, "polar: matrix ", b,
                    " of M did not converge with method='", a.method,
                    "': it is too ill-conditioned or rank-deficient. Use method='auto' or 'svd'.");
  }
  return {Q, info_of(outcomes)};
}

Tensor riemannian_gradient_(const signatures::RiemannianGradient& a) {
  const size_t count = a.factors.size();
  check_counts({a.op, "gradients"}, a.gradients.size(), "factors", count);
  if (!a.snapshots.empty()) check_counts({a.op, "snapshots"}, a.snapshots.size(), "factors", count);
  Memory memory;
  std::vector<stella::GradientJob> jobs;
  jobs.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t at = static_cast<int64_t>(i);
    const Argument factor = {a.op, "factors", at}, gradient = {a.op, "gradients", at}, copy = {a.op, "snapshots", at};
    stella::GradientJob job = {{}, tall_matrix_of(a.factors[i], factor), {}};
    check_alike(a.gradients[i], gradient, a.factors[i], factor);
    job.gradient = matrix_of(a.gradients[i], gradient);
    memory.written(job.gradient, gradient);
    memory.read(job.factor, factor);
    if (!a.snapshots.empty()) {
      check_alike(a.snapshots[i], copy, a.factors[i], factor);
      job.snapshot = matrix_of(a.snapshots[i], copy);
      memory.written(job.snapshot, copy);
    }
    jobs.push_back(job);
  }
  memory.check();
  return info_of(stella::riemannian_gradient(pool(), jobs));
}

Tensor project_retract_(const signatures::ProjectRetract& a) {
  const size_t count = a.moved.size();
  check_counts({a.op, "previous"}, a.previous.size(), "moved", count);
  STD_TORCH_CHECK(a.divisors.size() == count, Argument{a.op, "divisors"}, "found ", a.divisors.size(), ", wanted ",
                  count, ", one a factor.");
  const stella::Method method = method_of(a.op, a.method);
  Memory memory;
  std::vector<stella::RetractJob> jobs;
  jobs.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t at = static_cast<int64_t>(i);
    const Argument moved = {a.op, "moved", at}, previous = {a.op, "previous", at};
    STD_TORCH_CHECK(a.divisors[i] > 0 && a.divisors[i] < HUGE_VAL, Argument{a.op, "divisors", at}, "found ",
                    a.divisors[i], ", wanted a positive number.");
    const stella::MatrixView view = tall_matrix_of(a.moved[i], moved);
    check_alike(a.previous[i], previous, a.moved[i], moved);
    jobs.push_back({view, matrix_of(a.previous[i], previous), a.divisors[i]});
    memory.written(view, moved);
    memory.read(jobs.back().previous, previous);
  }
  memory.check();
  return info_of(stella::project_retract(pool(), jobs, method));
}

Tensor stella_adamw_(const signatures::StellaAdamWStep& a) {
  const size_t count = a.factors.size();
  check_counts({a.op, "gradients"}, a.gradients.size(), "factors", count);
  check_counts({a.op, "exp_avgs"}, a.exp_avgs.size(), "factors", count);
  check_counts({a.op, "exp_avg_sqs"}, a.exp_avg_sqs.size(), "factors", count);
  check_counts({a.op, "couplings"}, a.couplings.size(), "factors", count);
  const double* h = hyperparameters_of(a.hyperparameters, {a.op, "hyperparameters"}, count);
  Memory memory;
  std::vector<std::vector<double>> known(count);
  std::vector<stella::AdamwJob> jobs;
  jobs.reserve(count);
  for (size_t i = 0; i < count; ++i, h += kHyperparameters) {
    const int64_t at = static_cast<int64_t>(i);
    const Argument factor = {a.op, "factors", at}, gradient = {a.op, "gradients", at}, exp_avg = {a.op, "exp_avgs", at},
                   exp_avg_sq = {a.op, "exp_avg_sqs", at};
    const stella::MatrixView view = tall_matrix_of(a.factors[i], factor);
    check_alike(a.gradients[i], gradient, a.factors[i], factor);
    check_alike(a.exp_avgs[i], exp_avg, a.factors[i], factor);
    check_alike(a.exp_avg_sqs[i], exp_avg_sq, a.factors[i], factor);
    stella::AdamwJob job = {view,
                            matrix_of(a.gradients[i], gradient),
                            matrix_of(a.exp_avgs[i], exp_avg),
                            matrix_of(a.exp_avg_sqs[i], exp_avg_sq),
                            h[0],
                            h[1],
                            h[2],
                            h[3],
                            1.0 - std::pow(h[1], h[4]),
                            1.0 - std::pow(h[2], h[4]),
                            h[5],
                            h[6],
                            nullptr};
    check_step(h, {a.op, "hyperparameters", at});
    if (a.couplings[i].numel() > 0) {
      known[i] = square_of(a.couplings[i], {a.op, "couplings", at}, view.r);  // a copy, which nothing overwrites
      job.coupling = known[i].data();
    }
    memory.written(view, factor);
    memory.read(job.gradient, gradient);
    memory.written(job.first_moment, exp_avg);
    memory.written(job.second_moment, exp_avg_sq);
    jobs.push_back(job);
  }
  memory.check();
  return info_of(stella::adamw(pool(), jobs));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stella_kernels, CPU, m) {
  m.impl("polar", TORCH_BOX(&signatures::polar<polar>));
  m.impl("riemannian_gradient_", TORCH_BOX(&signatures::riemannian_gradient_<riemannian_gradient_>));
  m.impl("project_retract_", TORCH_BOX(&signatures::project_retract_<project_retract_>));
  m.impl("stella_adamw_", TORCH_BOX(&signatures::stella_adamw_<stella_adamw_>));
}

// The CPU kernels under torch's dispatcher, on the stable ABI: no at:: or c10:: symbol, so a wheel outlives a release.
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "signatures.h"
#include "torch/bindings.h"

namespace {

using namespace stella::bindings;
namespace signatures = stella::signatures;

constexpr int64_t kInfoColumns = 5;

stella::Method method_of(const std::string& name) {
  if (name == "auto") return stella::Method::automatic;
  if (name == "newton_schulz") return stella::Method::newton_schulz;
  if (name == "svd") return stella::Method::svd;
  STD_TORCH_CHECK(false, "method: found '", name, "', wanted 'auto', 'newton_schulz' or 'svd'.");
}

stella::MatrixView matrix_of(const Tensor& t, const char* argument) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) >= t.size(1), argument,
                  ": wanted (n, r) matrices with n >= r; a factor stored (r, n) is passed as its .mT view.");
  return {data_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1), storage_of(t, argument)};
}

Tensor info_of(const std::vector<stella::Outcome>& outcomes) {
  const int64_t sizes[2] = {static_cast<int64_t>(outcomes.size()), kInfoColumns};
  Tensor info = torch::stable::empty({sizes[0], sizes[1]}, ScalarType::Double);
  double* row = static_cast<double*>(info.mutable_data_ptr());
  for (const stella::Outcome& o : outcomes) {
    row[0] = static_cast<double>(o.status);
    row[1] = o.residual;
    row[2] = o.iterations;
    row[3] = static_cast<double>(o.path);
    row[4] = o.drift;
    row += kInfoColumns;
  }
  return info;
}

void check_pairs(size_t first, size_t second, const char* names) {
  STD_TORCH_CHECK(first == second, names, ": found ", first, " and ", second, " tensors, wanted as many of each.");
}

void check_same(const Tensor& a, const Tensor& b, const char* names) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), names, ": wanted the same dtype in each pair.");
  STD_TORCH_CHECK(a.dim() == b.dim() && a.size(0) == b.size(0) && a.size(1) == b.size(1), names,
                  ": wanted the same shape in each pair.");
}

// An (r, r) tensor as float64, row-major.
std::vector<double> square_of(const Tensor& t, int64_t r) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == r && t.size(1) == r, "couplings: wanted (r, r) tensors, or empty ones.");
  const bool narrow = t.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(narrow || t.scalar_type() == ScalarType::Double, "couplings: wanted float32 or float64.");
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
  STD_TORCH_CHECK(dims >= 2 && M.size(dims - 2) >= M.size(dims - 1), "M: wanted (..., n, r) with n >= r; pass M.mT.");
  const stella::Storage storage = storage_of(M, "M");
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
  const std::vector<stella::Outcome> outcomes = stella::polar(pool(), jobs, method_of(a.method));
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
  check_pairs(a.gradients.size(), a.factors.size(), "gradients, factors");
  if (!a.snapshots.empty()) check_pairs(a.factors.size(), a.snapshots.size(), "factors, snapshots");
  std::vector<stella::GradientJob> jobs;
  jobs.reserve(a.gradients.size());
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    check_same(a.gradients[i], a.factors[i], "gradients, factors");
    stella::GradientJob job = {matrix_of(a.gradients[i], "gradients"), matrix_of(a.factors[i], "factors"), {}};
    if (!a.snapshots.empty()) {
      check_same(a.factors[i], a.snapshots[i], "factors, snapshots");
      job.snapshot = matrix_of(a.snapshots[i], "snapshots");
    }
    jobs.push_back(job);
  }
  return info_of(stella::riemannian_gradient(pool(), jobs));
}

Tensor project_retract_(const signatures::ProjectRetract& a) {
  check_pairs(a.moved.size(), a.previous.size(), "moved, previous");
  check_pairs(a.moved.size(), a.divisors.size(), "moved, divisors");
  std::vector<stella::RetractJob> jobs;
  for (size_t i = 0; i < a.moved.size(); ++i) {
    check_same(a.moved[i], a.previous[i], "moved, previous");
    STD_TORCH_CHECK(a.divisors[i] > 0, "divisors: wanted positive numbers.");
    jobs.push_back({matrix_of(a.moved[i], "moved"), matrix_of(a.previous[i], "previous"), a.divisors[i]});
  }
  return info_of(stella::project_retract(pool(), jobs, method_of(a.method)));
}

Tensor stella_adamw_(const signatures::StellaAdamWStep& a) {
  constexpr int64_t kColumns = 7;
  const size_t count = a.factors.size();
  check_pairs(count, a.gradients.size(), "factors, gradients");
  check_pairs(count, a.exp_avgs.size(), "factors, exp_avgs");
  check_pairs(count, a.exp_avg_sqs.size(), "factors, exp_avg_sqs");
  check_pairs(count, a.couplings.size(), "factors, couplings");
  STD_TORCH_CHECK(
      a.hyperparameters.dim() == 2 && a.hyperparameters.size(0) == static_cast<int64_t>(count) &&
          a.hyperparameters.size(1) == kColumns && a.hyperparameters.is_contiguous() &&
          a.hyperparameters.scalar_type() == ScalarType::Double && a.hyperparameters.is_cpu(),
      "hyperparameters: wanted a contiguous float64 CPU tensor of shape (factors, 7): learning rate, beta1, "
      "beta2, epsilon, step, divisor, sign.");
  const double* h = static_cast<const double*>(a.hyperparameters.const_data_ptr());
  std::vector<std::vector<double>> known(count);
  std::vector<stella::AdamwJob> jobs;
  jobs.reserve(count);
  for (size_t i = 0; i < count; ++i, h += kColumns) {
    check_same(a.factors[i], a.gradients[i], "factors, gradients");
    check_same(a.factors[i], a.exp_avgs[i], "factors, exp_avgs");
    check_same(a.factors[i], a.exp_avg_sqs[i], "factors, exp_avg_sqs");
    stella::AdamwJob job = {matrix_of(a.factors[i], "factors"),
                            matrix_of(a.gradients[i], "gradients"),
                            matrix_of(a.exp_avgs[i], "exp_avgs"),
                            matrix_of(a.exp_avg_sqs[i], "exp_avg_sqs"),
                            h[0],
                            h[1],
                            h[2],
                            h[3],
                            1.0 - std::pow(h[1], h[4]),
                            1.0 - std::pow(h[2], h[4]),
                            h[5],
                            h[6],
                            nullptr};
    STD_TORCH_CHECK(job.divisor > 0 && h[4] >= 1, "hyperparameters: wanted positive divisors and steps from 1 on.");
    if (a.couplings[i].numel() > 0) {
      known[i] = square_of(a.couplings[i], job.factor.r);
      job.coupling = known[i].data();
    }
    jobs.push_back(job);
  }
  return info_of(stella::adamw(pool(), jobs));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stella_kernels, CPU, m) {
  m.impl("polar", TORCH_BOX(&signatures::polar<polar>));
  m.impl("riemannian_gradient_", TORCH_BOX(&signatures::riemannian_gradient_<riemannian_gradient_>));
  m.impl("project_retract_", TORCH_BOX(&signatures::project_retract_<project_retract_>));
  m.impl("stella_adamw_", TORCH_BOX(&signatures::stella_adamw_<stella_adamw_>));
}

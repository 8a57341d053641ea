// The phases of a step on some rows of each factor under torch's dispatcher, on the stable ABI: signatures.py, PHASES.
#include "stiefel/phases.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "signatures.h"
#include "torch/arguments.h"
#include "torch/bindings.h"

namespace {

using namespace stella::bindings;
using stella::Blocks;
using stella::MatrixView;
namespace signatures = stella::signatures;

int64_t words_of(int64_t r, bool norm) { return r * r + r * (r + 1) / 2 + (norm ? 1 : 0); }

ScalarType arithmetic_of(const std::vector<Tensor>& factors) {
  return !factors.empty() && factors[0].scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// As many of each, and each like the factor of its place.
std::vector<MatrixView> rows_of(const char* op, const char* name, const std::vector<Tensor>& tensors, const char* first,
                                const std::vector<Tensor>& factors) {
  check_counts({op, name}, tensors.size(), first, factors.size());
  std::vector<MatrixView> views;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Argument argument = {op, name, static_cast<int64_t>(i)};
    views.push_back(matrix_of(tensors[i], argument));
    check_alike(tensors[i], argument, factors[i], {op, first, static_cast<int64_t>(i)});
    STD_TORCH_CHECK(tensors[i].scalar_type() == tensors[0].scalar_type(), argument, "found ", dtype_of(tensors[i]),
                    ", wanted ", dtype_of(tensors[0]), ", as the first is: a call takes factors of one dtype.");
  }
  return views;
}

Tensor flat_of(const std::vector<Blocks>& blocks, const std::vector<double>& norms, ScalarType dtype) {
  int64_t count = static_cast<int64_t>(norms.size());
  for (const Blocks& b : blocks) count += static_cast<int64_t>(b.full.size() + b.upper.size());
  Tensor flat = torch::stable::empty({count}, dtype);
  const auto fill = [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    for (size_t i = 0; i < blocks.size(); ++i) {
      for (const double value : blocks[i].full) *out++ = static_cast<T>(value);
      for (const double value : blocks[i].upper) *out++ = static_cast<T>(value);
      if (!norms.empty()) *out++ = static_cast<T>(norms[i]);
    }
  };
  if (dtype == ScalarType::Double)
    fill(static_cast<double*>(flat.mutable_data_ptr()));
  else
    fill(static_cast<float*>(flat.mutable_data_ptr()));
  return flat;
}

// A flat buffer, back in blocks.
std::vector<Blocks> blocks_of(const Tensor& flat, const Argument& a, const std::vector<MatrixView>& factors,
                              ScalarType dtype, bool norms) {
  int64_t wanted = 0;
  for (const MatrixView& m : factors) wanted += words_of(m.r, norms);
  STD_TORCH_CHECK(
      flat.is_cpu() && flat.dim() == 1 && flat.size(0) == wanted && flat.is_contiguous() && flat.scalar_type() == dtype,
      a, "found ", shape_of(flat), ", ", dtype_of(flat), ", wanted (", wanted, ",), ",
      dtype == ScalarType::Double ? "float64" : "float32", ", contiguous, on the CPU.");
  check_in_memory(flat, a);
  std::vector<Blocks> blocks(factors.size());
  const auto read = [&](const auto* in) {
    for (size_t i = 0; i < factors.size(); ++i) {
      const int64_t r = factors[i].r;
      blocks[i].full.assign(in, in + r * r);
      blocks[i].upper.assign(in + r * r, in + words_of(r, false));
      in += words_of(r, norms);
    }
  };
  if (dtype == ScalarType::Double)
    read(static_cast<const double*>(flat.const_data_ptr()));
  else
    read(static_cast<const float*>(flat.const_data_ptr()));
  return blocks;
}

std::vector<stella::GradientJob> gradient_jobs(const std::vector<MatrixView>& gradients,
                                               const std::vector<MatrixView>& factors) {
  std::vector<stella::GradientJob> jobs;
  for (size_t i = 0; i < factors.size(); ++i) jobs.push_back({gradients[i], factors[i], {}});
  return jobs;
}

Tensor gradient_gram(const signatures::GradientGram& a) {
  const auto factors = rows_of(a.op, "factors", a.factors, "factors", a.factors);
  const auto jobs = gradient_jobs(rows_of(a.op, "gradients", a.gradients, "factors", a.factors), factors);
  return flat_of(stella::gradient_blocks(pool(), jobs), stella::gradient_norms(pool(), jobs), arithmetic_of(a.factors));
}

Tensor riemannian_gradient_rows_(const signatures::RiemannianGradientRows& a) {
  const auto factors = rows_of(a.op, "factors", a.factors, "factors", a.factors);
  const auto gradients = rows_of(a.op, "gradients", a.gradients, "factors", a.factors);
  auto jobs = gradient_jobs(gradients, factors);
  Memory memory;
  for (size_t i = 0; i < jobs.size(); ++i) {
    memory.written(gradients[i], {a.op, "gradients", static_cast<int64_t>(i)});
    memory.read(factors[i], {a.op, "factors", static_cast<int64_t>(i)});
  }
  if (!a.snapshots.empty()) {
    const auto snapshots = rows_of(a.op, "snapshots", a.snapshots, "factors", a.factors);
    for (size_t i = 0; i < jobs.size(); ++i) {
      jobs[i].snapshot = snapshots[i];
      memory.written(snapshots[i], {a.op, "snapshots", static_cast<int64_t>(i)});
    }
  }
  memory.check();
  const ScalarType dtype = arithmetic_of(a.factors);
  stella::subtract_blocks(pool(), jobs, blocks_of(a.sums, {a.op, "sums"}, factors, dtype, true));
  return torch::stable::empty({0}, dtype);
}

template <typename Arguments>
std::vector<stella::RetractJob> retract_jobs(const Arguments& a, bool written) {
  const auto moved = rows_of(a.op, "moved", a.moved, "moved", a.moved);
  const auto previous = rows_of(a.op, "previous", a.previous, "moved", a.moved);
  STD_TORCH_CHECK(a.divisors.size() == moved.size(), Argument{a.op, "divisors"}, "found ", a.divisors.size(),
                  ", wanted ", moved.size(), ", one a factor.");
  Memory memory;
  std::vector<stella::RetractJob> jobs;
  for (size_t i = 0; i < moved.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    STD_TORCH_CHECK(a.divisors[i] > 0 && a.divisors[i] < HUGE_VAL, Argument{a.op, "divisors", at}, "found ",
                    a.divisors[i], ", wanted a positive number.");
    jobs.push_back({moved[i], previous[i], a.divisors[i]});
    if (written) {
      memory.written(moved[i], {a.op, "moved", at});
      memory.read(previous[i], {a.op, "previous", at});
    }
  }
  memory.check();
  return jobs;
}

std::vector<MatrixView> moved_of(const std::vector<stella::RetractJob>& jobs) {
  std::vector<MatrixView> views;
  for (const stella::RetractJob& job : jobs) views.push_back(job.moved);
  return views;
}

Tensor retract_gram(const signatures::RetractGram& a) {
  return flat_of(stella::step_blocks(pool(), retract_jobs(a, false)), {}, arithmetic_of(a.moved));
}

Tensor retract_rows_(const signatures::RetractRows& a) {
  const auto jobs = retract_jobs(a, true);
  const ScalarType dtype = arithmetic_of(a.moved);
  const auto points = blocks_of(a.sums, {a.op, "sums"}, moved_of(jobs), dtype, true);
  const auto steps = blocks_of(a.grams, {a.op, "grams"}, moved_of(jobs), dtype, false);
  return info_of(stella::retract_rows(pool(), jobs, points, steps));
}

std::tuple<Tensor, Tensor> adamw_gram_(const signatures::AdamWGram& a) {
  const size_t count = a.factors.size();
  const auto factors = rows_of(a.op, "factors", a.factors, "factors", a.factors);
  const auto gradients = rows_of(a.op, "gradients", a.gradients, "factors", a.factors);
  const auto firsts = rows_of(a.op, "exp_avgs", a.exp_avgs, "factors", a.factors);
  const auto seconds = rows_of(a.op, "exp_avg_sqs", a.exp_avg_sqs, "factors", a.factors);
  const double* h = hyperparameters_of(a.hyperparameters, {a.op, "hyperparameters"}, count);
  Memory memory;
  std::vector<stella::AdamwJob> jobs;
  std::vector<int64_t> sizes;
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i, h += kHyperparameters) {
    const int64_t at = static_cast<int64_t>(i);
    check_step(h, {a.op, "hyperparameters", at});
    jobs.push_back({factors[i], gradients[i], firsts[i], seconds[i], h[0], h[1], h[2], h[3], 1.0 - std::pow(h[1], h[4]),
                    1.0 - std::pow(h[2], h[4]), h[5], h[6], nullptr});
    memory.read(factors[i], {a.op, "factors", at});
    memory.read(gradients[i], {a.op, "gradients", at});
    memory.written(firsts[i], {a.op, "exp_avgs", at});
    memory.written(seconds[i], {a.op, "exp_avg_sqs", at});
    sizes.push_back(stella::adamw_kept_bytes(jobs.back()));
    bytes += sizes.back();
  }
  memory.check();
  const ScalarType dtype = arithmetic_of(a.factors);
  const auto points = blocks_of(a.sums, {a.op, "sums"}, factors, dtype, true);
  Tensor kept = torch::stable::empty({bytes / (dtype == ScalarType::Double ? 8 : 4)}, dtype);
  std::vector<char*> places;
  char* place = static_cast<char*>(kept.mutable_data_ptr());
  for (const int64_t size : sizes) {
    places.push_back(place);
    place += size;
  }
  return {flat_of(stella::adamw_blocks(pool(), jobs, points, places), {}, dtype), kept};
}

Tensor adamw_rows_(const signatures::AdamWRows& a) {
  const auto factors = rows_of(a.op, "factors", a.factors, "factors", a.factors);
  const ScalarType dtype = arithmetic_of(a.factors);
  const Argument steps = {a.op, "steps"};
  check_in_memory(a.steps, steps);
  Memory memory;
  std::vector<char*> places;
  char* place = static_cast<char*>(data_of(a.steps));
  int64_t bytes = 0;
  for (size_t i = 0; i < factors.size(); ++i) {
    memory.written(factors[i], {a.op, "factors", static_cast<int64_t>(i)});
    places.push_back(place + bytes);
    // rows of float32 or panels of it: the first byte says which
    stella::AdamwJob job = {};
    job.factor = job.gradient = job.first_moment = job.second_moment = factors[i];
    STD_TORCH_CHECK(a.steps.is_cpu() && a.steps.is_contiguous() && a.steps.scalar_type() == dtype &&
                        bytes < a.steps.numel() * static_cast<int64_t>(a.steps.element_size()),
                    steps, "found ", shape_of(a.steps), ", ", dtype_of(a.steps), ", wanted what adamw_gram_ returned.");
    if (!*places.back()) job.gradient.row_stride = job.gradient.col_stride = 2;
    bytes += stella::adamw_kept_bytes(job);
  }
  memory.check();
  STD_TORCH_CHECK(bytes == a.steps.numel() * static_cast<int64_t>(a.steps.element_size()), steps, "found ",
                  shape_of(a.steps), ", wanted what adamw_gram_ returned for these factors.");
  const auto points = blocks_of(a.sums, {a.op, "sums"}, factors, dtype, true);
  const auto grams = blocks_of(a.grams, {a.op, "grams"}, factors, dtype, false);
  return info_of(stella::adamw_rows(pool(), factors, points, grams, places));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stella_kernels, CPU, m) {
  m.impl("gradient_gram", TORCH_BOX(&signatures::gradient_gram<gradient_gram>));
  m.impl("riemannian_gradient_rows_", TORCH_BOX(&signatures::riemannian_gradient_rows_<riemannian_gradient_rows_>));
  m.impl("retract_gram", TORCH_BOX(&signatures::retract_gram<retract_gram>));
  m.impl("retract_rows_", TORCH_BOX(&signatures::retract_rows_<retract_rows_>));
  m.impl("adamw_gram_", TORCH_BOX(&signatures::adamw_gram_<adamw_gram_>));
  m.impl("adamw_rows_", TORCH_BOX(&signatures::adamw_rows_<adamw_rows_>));
}

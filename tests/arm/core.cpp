// The CPU kernels as a program without torch, of which an emulator calls one function at a time; see emulator.py.
#include <cstddef>
#include <vector>

#include "adapter/schedule.h"
#include "stiefel/schedule.h"

using stella::MatrixView;

static_assert(sizeof(MatrixView) == 48 && offsetof(MatrixView, storage) == 40, "operators.py packs them");
static_assert(sizeof(stella::Dropout) == 32, "operators.py packs them");

namespace {

// Threads in turn: what several would do is done by one, in the same shares.
stella::Pool pool() {
  return {3, [](int64_t count, const std::function<void(int64_t)>& body) {
            for (int64_t i = 0; i < count; ++i) body(i);
          }};
}

void report(const std::vector<stella::Outcome>& outcomes, double* info) {
  for (const stella::Outcome& o : outcomes) {
    *info++ = static_cast<double>(o.status);
    *info++ = o.residual;
    *info++ = o.iterations;
    *info++ = static_cast<double>(o.path);
    *info++ = o.drift;
  }
}

}  // namespace

extern "C" {

__attribute__((used)) void polar(const MatrixView* in, const MatrixView* out, int64_t count, int64_t method,
                                 double* info) {
  std::vector<stella::PolarJob> jobs;
  for (int64_t i = 0; i < count; ++i) jobs.push_back({in[i], out[i]});
  report(stella::polar(pool(), jobs, static_cast<stella::Method>(method)), info);
}

__attribute__((used)) void project_retract(const MatrixView* moved, const MatrixView* previous, const double* divisors,
                                           int64_t count, int64_t method, double* info) {
  std::vector<stella::RetractJob> jobs;
  for (int64_t i = 0; i < count; ++i) jobs.push_back({moved[i], previous[i], divisors[i]});
  report(stella::project_retract(pool(), jobs, static_cast<stella::Method>(method)), info);
}

__attribute__((used)) void riemannian_gradient(const MatrixView* gradients, const MatrixView* factors,
                                               const MatrixView* snapshots, int64_t count, double* info) {
  std::vector<stella::GradientJob> jobs;
  for (int64_t i = 0; i < count; ++i)
    jobs.push_back({gradients[i], factors[i], snapshots ? snapshots[i] : MatrixView{}});
  report(stella::riemannian_gradient(pool(), jobs), info);
}

// `views` are factor, gradient and both moments of each job, `settings` its eight numbers in the order of AdamwJob.
__attribute__((used)) void stella_adamw(const MatrixView* views, const double* settings, const double* const* couplings,
                                        int64_t count, double* info) {
  std::vector<stella::AdamwJob> jobs;
  for (int64_t i = 0; i < count; ++i, views += 4, settings += 8)
    jobs.push_back({views[0], views[1], views[2], views[3], settings[0], settings[1], settings[2], settings[3],
                    settings[4], settings[5], settings[6], settings[7], couplings[i]});
  report(stella::adamw(pool(), jobs), info);
}

// `views` are x, y, A, the bias, U, V and S.
__attribute__((used)) void adapter_forward(const MatrixView* views, int64_t accumulate, int64_t diagonal,
                                           const double* scale, const stella::Dropout* dropout) {
  stella::AdapterForward job = {};
  job.x = views[0];
  job.y = views[1];
  job.A = views[2];
  job.bias = views[3];
  job.shape = {job.x.n, views[4].n, views[5].n, views[4].r, job.y.storage == stella::Storage::float64};
  job.accumulate = accumulate != 0;
  job.scale = *scale;
  job.dropout = *dropout;
  stella::adapter_forward(pool(), job, {views[4], views[5], views[6], diagonal != 0});
}

// `views` are grad_y, x, A, grad_x, U, V, S and the gradients of the last three, each without data where not asked for.
__attribute__((used)) void adapter_backward(const MatrixView* views, int64_t diagonal, const double* numbers,
                                            const stella::Dropout* dropout) {
  stella::AdapterBackward job = {};
  job.grad_y = views[0];
  job.x = views[1];
  job.A = views[2];
  job.grad_x = views[3];
  job.shape = {job.grad_y.n, views[4].n, views[5].n, views[4].r, job.grad_y.storage == stella::Storage::float64};
  job.need_U = views[7].data != nullptr;
  job.need_V = views[8].data != nullptr;
  job.need_S = views[9].data != nullptr;
  job.scale = numbers[0];
  job.beta = numbers[1];
  job.dropout = *dropout;
  stella::adapter_backward(pool(), job, {views[4], views[5], views[6], diagonal != 0},
                           {views[7], views[8], views[9], diagonal != 0});
}

__attribute__((used)) void philox_dropout(const MatrixView* views, const stella::Dropout* dropout) {
  stella::philox_dropout(pool(), views[0], views[1], *dropout);
}
}

int main() { return stella::kernels().vector_bytes; }  // everything is initialised: functions can be called

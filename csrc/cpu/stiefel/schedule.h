// Which thread does which matrix: whole matrices from a queue, and the rows of the largest ones shared between threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/kernels.h"

namespace stella {

// Runs body(i) for i in [0, count) on any thread, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

struct Pool {
  int64_t threads;
  ParallelFor parallel_for;
};

// Tasks from a queue, so that a thread that is done early takes the next one. What a task computes does not depend on
// the thread that takes it. The first exception is rethrown, after every thread has stopped.
void run_queue(const Pool& pool, int64_t tasks, const std::function<void(int64_t)>& task);

std::vector<Outcome> polar(const Pool& pool, const std::vector<PolarJob>& jobs, Method method);

// A factor with a non-finite value is left as it was found, and its outcome says so.
std::vector<Outcome> project_retract(const Pool& pool, const std::vector<RetractJob>& jobs, Method method);

// Nothing at all is written when any gradient holds a non-finite value, or would as a Riemannian one (overflow). The
// gradient of a factor that holds one is left alone; so is one that overflows because its factor is far from
// orthonormal, by more than kNearDrift.
std::vector<Outcome> riemannian_gradient(const Pool& pool, const std::vector<GradientJob>& jobs);

// One Riemannian AdamW step of every factor. Gradients are checked first: if one holds a non-finite value nothing at
// all is written. A factor whose moments or step would overflow is left as it is, and the others take their step.
std::vector<Outcome> adamw(const Pool& pool, const std::vector<AdamwJob>& jobs);

}  // namespace stella

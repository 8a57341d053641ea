// The adapter's operators over a pool of threads: chunks of rows from a queue forward, groups of rows backward.
#pragma once

#include "adapter/kernels.h"
#include "stiefel/schedule.h"

namespace stella {

// Factors come as (features, r), the core as (r, r), or (1, r) when it is diagonal; strides say how they are stored.
struct AdapterFactors {
  MatrixView U, V, core;
  bool diagonal;
};

// y += or = scale d(x) V S^T U^T; A = d(x) V. The job's plan and packed factors are filled in here.
void adapter_forward(const Pool& pool, AdapterForward job, const AdapterFactors& factors);

// grad_x = beta grad_x + d^T(K V^T), and the gradients that the job asks for, as the factors are seen.
void adapter_backward(const Pool& pool, AdapterBackward job, const AdapterFactors& factors,
                      const AdapterFactors& gradients);

void philox_dropout(const Pool& pool, const MatrixView& x, const MatrixView& out, const Dropout& dropout);

}  // namespace stella

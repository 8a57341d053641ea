"""What a row of ``info`` says: (k, 5) float64, for each matrix or factor status, residual, iterations, path and drift.

- residual: a bound on ``‖QᵀQ − I‖_F`` of the result as it is stored, rounded to its dtype; measured or derived. 0 where
  an operator retracts nothing, NaN where it could not.
- drift: ``‖YᵀY − I‖_F`` of the point Y at which the step began, as it was handed over (``previous`` of
  project_retract_): at most ``8 eps sqrt(r)`` where nobody has moved an orthonormal float32 factor since, beside the
  rounding of a shorter storage. 0 of polar, NaN where the step was refused before YᵀY was known.

It is on the CPU, but of an operator over lists that Triton serves on the factors' device, so that nothing has to wait
for it. ``csrc/cpu/common/kernels.h`` has the same codes.

Below that, how long the flat buffers are that the phases of a step exchange (``signatures.PHASES``).
"""

from __future__ import annotations

import torch

STATUS_OK = 0
STATUS_NON_FINITE = 1
STATUS_NOT_CONVERGED = 2
STATUS_OVERFLOW = 3  # of finite data, foreseen: a Riemannian gradient, a moment or a retraction past its dtype's range

PATH_NEWTON_SCHULZ = 0
PATH_FLOAT64_GRAM = 1
PATH_SVD = 2

RESIDUAL, DRIFT = 1, 4  # columns
INFO_COLUMNS = 5


LARGEST_NORM = 1e30  # that is sent: that of finite gradients stays finite when processes add theirs


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which factors of that dtype are computed with."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def sums_words(r: int) -> int:
    """Words of ``sums`` a factor."""
    return grams_words(r) + 1


def grams_words(r: int) -> int:
    """Words of ``grams`` a factor."""
    return r * r + r * (r + 1) // 2

"""What a row of ``info`` says: (k, 4) float64, for each matrix or factor its status, residual, iterations and path.

It is on the CPU, but of an operator over lists that Triton serves on the factors' device, so that nothing has to wait
for it. ``csrc/cpu/common/kernels.h`` has the same codes.
"""

from __future__ import annotations

STATUS_OK = 0
STATUS_NON_FINITE = 1
STATUS_NOT_CONVERGED = 2

PATH_NEWTON_SCHULZ = 0
PATH_FLOAT64_GRAM = 1
PATH_SVD = 2

INFO_COLUMNS = 4

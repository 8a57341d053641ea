"""The base layer's product where it is accumulated: torch's, or, in half precision on a CPU without it, float32 blocks.

There torch's product of bfloat16 or float16 matrices runs at a small part of float32's speed (measured on AVX2, (512,
1024) by (1024, 1024): 7 GFLOP/s where the second is stored transposed, below 1 where it is not, float32 160).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_BLOCK = 1024  # rows and columns: a few megabytes of float32 at a time
_FEWEST_ROWS = 16  # below, widening the weight takes longer than torch's product


@functools.cache
def library_computes_in(dtype: torch.dtype) -> bool:
    """Whether torch's library has kernels for products in ``dtype`` on this CPU, or there is no telling."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in names or not torch.backends.mkldnn.is_available():
        return True
    supported = getattr(torch.ops.mkldnn, names[dtype], None)
    return supported is None or bool(supported())


def accumulate_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` in place: (T, n) += (T, k) (k, n), of one dtype; sums in float32 at least."""
    if torch.compiler.is_compiling() or library_computes_in(out.dtype) or out.shape[0] < _FEWEST_ROWS:
        out.addmm_(left, right)
        return
    for columns, block in zip(out.split(_BLOCK, 1), right.split(_BLOCK, 1), strict=True):
        wide = block.float()  # (k, at most 1024)
        for part, rows in zip(columns.split(_BLOCK), left.split(_BLOCK), strict=True):
            part.copy_(part.float().addmm_(rows.float(), wide))

"""The convolution with StelLA adapters: one with the kernel Vᵀ, then one of size 1 with U S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...nn import Term
from .adapted import AdaptedLayer


class Conv(AdaptedLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with StelLA adapters.

    W is (out, in, kh, kw), as a matrix (out, n) with n = in · kh · kw, so U is (out, r) and Vᵀ (r, n).
    """

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s · U S Vᵀ``, less the start of a 'pseudo_zero' adapter, (out, in, kh, kw), in the factors' dtype."""
        base: Any = self.get_base_layer()
        return super().get_delta_weight(adapter).reshape(base.weight.shape)

    def _plus(self, y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
        base: Any = self.get_base_layer()
        sizes = base.weight.shape[1:]  # (in, kh, kw)
        ones = (1,) * (len(sizes) - 1)
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(ones)]
        total = y
        for U, S, Vt, scale, p in terms:
            if self.cast_input_dtype_enabled:
                taken = x.to(U.dtype)
            else:  # PEFT's switch: then it is the factors that are cast
                taken, U, S, Vt = x, U.to(x.dtype), S.to(x.dtype), Vt.to(x.dtype)
            taken = F.dropout(taken, p)  # 0 outside training
            # stride and padding as the base's own
            part = base._conv_forward(taken, Vt.reshape(-1, *sizes), None)  # (B, r, h, w)
            US = (U * S if S.dim() == 1 else U @ S) * scale  # (out, r)
            total = total + convolve(part, US.reshape(*US.shape, *ones))  # (B, out, h, w)
        return total.to(y.dtype)

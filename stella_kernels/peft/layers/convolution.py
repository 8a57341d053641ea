"""The convolution with StelLA adapters: one with the kernel Vᵀ, then one of size 1 with U S."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...nn import Term
from ...reference.autocast import without_autocast
from ..base_layer import kernel_sizes
from .adapted import AdaptedLayer, left_product

_OF_SIZE_ONE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(AdaptedLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with StelLA adapters, without groups.

    The base weight is (m, in, kh, kw), as a matrix (m, n) with n = in · kh · kw, so U is (m, r) and Vᵀ (r, n).
    Everything is computed in the dtype of the base's output, autocast's inside autocast.
    """

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s · U S Vᵀ``, less the start of a 'pseudo_zero' adapter, (m, in, kh, kw), in the factors' dtype."""
        return self._kernel(super().get_delta_weight(adapter))

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)  # (m, n)

    def _kernel(self, matrix: Tensor) -> Tensor:
        """(k, n) as the kernel of k channels, (k, in, kh, kw)."""
        return matrix.unflatten(1, kernel_sizes(self.get_base_layer()))

    def _plus(self, y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
        base: Any = self.get_base_layer()
        ones = (1,) * len(base.kernel_size)
        with without_autocast(y.device):
            for U, S, Vt, scale, p in terms:
                taken = F.dropout(x.to(y.dtype), p)  # (B, in, H, W); p is 0 outside training
                # stride, padding and dilation are the base's own
                part = base._conv_forward(taken, self._kernel(Vt.to(y.dtype)), None)  # (B, r, h, w)
                left = left_product(U, S, scale).to(y.dtype)  # (m, r)
                y = y + _OF_SIZE_ONE[len(ones)](part, left.reshape(*left.shape, *ones))  # (B, m, h, w)
        return y

"""The embedding with StelLA adapters: rows of V gathered, and one small product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...nn import Term
from ...reference.autocast import without_autocast
from .adapted import AdaptedLayer, left_product


class Embedding(AdaptedLayer):
    """``nn.Embedding``, whole numbers (...) to (..., m), with StelLA adapters: ``s · U S Vᵀ[:, i]`` for the number i.

    The base weight is (n, m), so U is (m, r) and Vᵀ (r, n). Numbers cannot be dropped out, so that ``lora_dropout`` has
    no effect here, as in PEFT's LoRA. An embedding that multiplies its output by a number (``embed_scale``) has the
    adapter's multiplied too. The vector of the padding (``padding_idx``) starts with nothing added to it, and as no
    gradient reaches its row of V, a step adds nothing to it either. ``scale_grad_by_freq`` is heeded for V, ``sparse``
    is not: the gradients are dense.
    """

    def _initialise(self, U: Tensor, S: Tensor, Vt: Tensor, init: bool | str) -> None:
        others = self._all_but_padding(Vt.device)
        if others is None or Vt.is_meta:
            super()._initialise(U, S, Vt, init)
            return
        rest = Vt.detach()[:, others]  # (r, n - 1)
        super()._initialise(U, S, rest, init)
        with torch.no_grad():
            Vt.zero_()[:, others] = rest

    def _as_matrix(self, weight: Tensor) -> Tensor:
        others = self._all_but_padding(weight.device)
        return weight if others is None else weight[others]  # (n, m) or (n - 1, m)

    def _all_but_padding(self, device: torch.device) -> Tensor | None:
        """(n,), False for the padding alone; None where there is none."""
        base: Any = self.get_base_layer()
        if base.padding_idx is None:
            return None
        return torch.arange(self.in_features, device=device) != base.padding_idx

    def _plus(self, y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
        base: Any = self.get_base_layer()
        factor: Any = getattr(base, "embed_scale", 1.0)
        if isinstance(factor, Tensor):
            factor = factor.to(y.dtype)  # rounded as the base rounds it
        with without_autocast(y.device):
            for U, S, Vt, scale, _ in terms:
                # no gradient for the padding's row, as of the base
                rows = F.embedding(x, Vt.mT, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (..., r)
                left = left_product(U, S, scale) * factor  # (m, r)
                y = y + rows.to(y.dtype) @ left.to(y.dtype).mT  # (..., m)
        return y

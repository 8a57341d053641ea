"""The embedding with StelLA adapters: rows of V gathered, and two small products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...nn import Term
from .adapted import AdaptedLayer


class Embedding(AdaptedLayer):
    """``nn.Embedding``, indices (...) to (..., d), with StelLA adapters: ``s · U S Vᵀ[:, i]`` for the index i.

    W is (V, d), so U is (d, r) and Vᵀ (r, V). Indices cannot be dropped out, so that ``lora_dropout`` has no effect
    here, as in PEFT's LoRA. An embedding that scales its output (``embed_scale``) scales the adapter's as well.
    """

    def _plus(self, y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
        base: Any = self.get_base_layer()
        total = y
        for U, S, Vt, scale, _ in terms:
            # no gradient for the padding's row, as of the base
            rows = F.embedding(x, Vt.mT, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (..., r)
            part = rows * S if S.dim() == 1 else rows @ S.mT  # (..., r)
            part = (part @ U.mT) * scale  # (..., d)
            if (embed_scale := getattr(base, "embed_scale", None)) is not None:
                part = part * embed_scale
            total = total + part
        return total.to(y.dtype)

"""The module that stores one factor, and what it takes from the base layer: device and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.masters import check_stored, master_after_apply

_HALF_DTYPES = (torch.bfloat16, torch.float16)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: in bfloat16 a factor is already 2e-4 off its manifold."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def base_device_and_dtype(base: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where a base layer's weight is and what it is; (None, float32) for a layer without tensors of its own."""
    named = (getattr(base, name, None) for name in ("weight", "qweight", "W_q"))
    tensors = (tensor for tensor in (*named, *base.parameters(), *base.buffers()) if isinstance(tensor, Tensor))
    weight = next(tensors, None)
    return (None, torch.float32) if weight is None else (weight.device, weight.dtype)


class Factor(nn.Module):
    """One stored factor, ``weight``: a full-precision master, also when its model is cast to half precision.

    ``orthonormal`` says which side is: 'columns' (U), 'rows' (Vᵀ), or None (S). ``master`` is the dtype promised.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None, orthonormal: str | None = None
    ) -> None:
        super().__init__()
        self.orthonormal = orthonormal
        self.master = dtype
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> Factor:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # `model.to(torch.bfloat16)` moves the factor but does not round it off its manifold
            return tensor.to(moved.device) if moved.dtype in _HALF_DTYPES else moved

        before = self.weight.dtype
        super()._apply(keep_precision, recurse)
        self.master = master_after_apply(self.weight, before, self.master, keep_precision)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        faults = len(error_msgs)
        check_stored(state_dict, prefix + "weight", self.weight, self.orthonormal, error_msgs)
        if len(error_msgs) == faults:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, dtype={self.weight.dtype}"

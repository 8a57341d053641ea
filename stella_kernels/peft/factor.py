"""The module that stores one factor, and what it takes from the base layer: kind, sizes, device, dtype."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn.masters import check_stored, master_after_apply

_HALF_DTYPES = (torch.bfloat16, torch.float16)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: in bfloat16 a factor is already 2e-4 off its manifold."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def base_device_and_dtype(base: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where a base layer's weight is and what it is; (None, float32) for a layer without tensors of its own."""
    named = (getattr(base, name, None) for name in ("weight", "qweight", "W_q"))
    tensors = (tensor for tensor in (*named, *base.parameters(), *base.buffers()) if isinstance(tensor, Tensor))
    weight = next(tensors, None)
    return (None, torch.float32) if weight is None else (weight.device, weight.dtype)


def layer_features(base: nn.Module) -> tuple[int, int] | None:
    """(n, m), the sizes of the input and output of a layer; None if ``base`` is of no kind that can be adapted.

    An embedding takes one of n vectors, and a convolution n = in · kh · kw numbers at a time.
    """
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if is_convolution(base):
        weight: Any = base.weight  # (out, in / groups, kh, kw)
        return math.prod(weight.shape[1:]), weight.shape[0]
    if isinstance(base, Conv1D):
        n, m = getattr(base.weight, "ds_shape", base.weight.shape)
        return int(n), int(m)
    for n_name, m_name in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        n, m = getattr(base, n_name, None), getattr(base, m_name, None)
        if isinstance(n, int) and isinstance(m, int):
            return n, m
    return None


def is_convolution(base: nn.Module) -> bool:
    """Whether it is an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``."""
    return isinstance(base, _CONVOLUTIONS)


def layer_kind(base: nn.Module) -> str | list[int] | None:
    """'embedding', the sizes (in, kh, kw) of a convolution's kernel, or None: a linear layer."""
    if isinstance(base, nn.Embedding):
        return "embedding"
    return [int(size) for size in cast(Tensor, base.weight).shape[1:]] if is_convolution(base) else None


def why_unfit(base: nn.Module) -> str | None:
    """What about an embedding or a convolution an adapter would not heed, as '…, wanted …'; None for nothing."""
    layer: Any = base
    if isinstance(base, nn.Embedding):
        if base.max_norm is not None:
            return f"has max_norm={base.max_norm}, wanted None: looking rows up changes them, and not the adapter's"
        if type(base).forward is not nn.Embedding.forward and not hasattr(base, "embed_scale"):
            return f"is a {type(base).__name__} with a forward of its own, wanted that of nn.Embedding"
        if getattr(base, "_hf_tp_plan", None) is not None:
            return "is spread over processes (tensor parallel), wanted a whole embedding"
    elif is_convolution(base):
        if layer.groups != 1:
            return f"has groups={layer.groups}, wanted 1: of groups the update is no matrix of rank r"
        if any(step != 1 for step in layer.dilation):
            return f"has dilation={layer.dilation}, wanted 1: PEFT's LoRA, which an export has to be, knows no other"
        if layer.padding_mode != "zeros":
            return f"has padding_mode={layer.padding_mode!r}, wanted 'zeros': PEFT's LoRA pads with zeros"
        if not any(type(base).forward is kind.forward for kind in _CONVOLUTIONS):
            return f"is a {type(base).__name__} with a forward of its own, wanted that of nn.Conv1d to nn.Conv3d"
    return None


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

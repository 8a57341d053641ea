"""What can be adapted: the kinds of base layers, their sizes, and what about one an adapter would not heed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..serving.layer_kinds import Kind

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_features(base: nn.Module) -> tuple[int, int] | None:
    """(n, m), the sizes of the input and output of a layer; None if ``base`` is of no kind that can be adapted.

    An embedding takes one of n vectors, and a convolution n = in · kh · kw numbers at a time.
    """
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if isinstance(base, CONVOLUTIONS):
        return math.prod(kernel_sizes(base)), base.out_channels
    if isinstance(base, Conv1D):
        n, m = getattr(base.weight, "ds_shape", base.weight.shape)
        return int(n), int(m)
    for n_name, m_name in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        n, m = getattr(base, n_name, None), getattr(base, m_name, None)
        if isinstance(n, int) and isinstance(m, int):
            return n, m
    return None


def largest_rank(base: nn.Module, n: int, m: int) -> int:
    """The most columns that U and V can have: of the vector of a padding V holds none."""
    return min(n - 1 if isinstance(base, nn.Embedding) and base.padding_idx is not None else n, m)


def kernel_sizes(base: nn.Module) -> tuple[int, ...]:
    """(in, kh, kw) of a convolution without groups; not read from its weight, which may be elsewhere (ZeRO-3)."""
    layer: Any = base
    return (layer.in_channels, *layer.kernel_size)


def layer_kind(base: nn.Module) -> Kind:
    """'embedding', the sizes of a convolution's kernel, or in words one that PEFT's LoRA does not compute; else None.

    PEFT's LoRA gives a convolution's adapter its stride and its padding, and no more.
    """
    if isinstance(base, nn.Embedding):
        return "embedding"
    if not isinstance(base, CONVOLUTIONS):
        return None
    if any(step != 1 for step in base.dilation):
        return f"convolution with dilation={base.dilation}"
    if base.padding_mode != "zeros":
        return f"convolution with padding_mode={base.padding_mode!r}"
    return list(kernel_sizes(base))


def why_unfit(base: nn.Module) -> str | None:
    """What about an embedding or a convolution an adapter would not heed, as '…, wanted …'; None for nothing."""
    if isinstance(base, nn.Embedding):
        return _why_unfit_embedding(base)
    if isinstance(base, CONVOLUTIONS):
        if base.groups != 1:
            return f"has groups={base.groups}, wanted 1: an adapter's first convolution takes all channels together"
        own = type(base)
        if not any((own.forward, own._conv_forward) == (kind.forward, kind._conv_forward) for kind in CONVOLUTIONS):
            return f"is a {own.__name__} with a forward of its own, wanted that of nn.Conv1d to nn.Conv3d"
    return None


def _why_unfit_embedding(base: nn.Embedding) -> str | None:
    if base.max_norm is not None:
        return f"has max_norm={base.max_norm}, wanted None: looking a row up changes its weight, and not the adapter's"
    if getattr(base, "_hf_tp_plan", None) is not None:
        return "is spread over processes (tensor parallel), wanted a whole embedding"
    if type(base).forward is not nn.Embedding.forward and not _is_number(getattr(base, "embed_scale", None)):
        return (
            f"is a {type(base).__name__} with a forward of its own, wanted that of nn.Embedding, or one that "
            "multiplies its output by a number, embed_scale"
        )
    return None


def _is_number(scale: object) -> bool:
    return scale.numel() == 1 if isinstance(scale, Tensor) else isinstance(scale, int | float)

"""Layers that cannot take an adapter because their parent reads ``.weight`` and never calls them.

An adapter there has no effect and gets no gradient. Two parents of torch are known for it, and models for which PEFT
keeps a list; any other is warned of when the model first runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn

from .layer import Seen
from .layers import AdaptedLayer


def why_never_called(model: nn.Module, name: str) -> str | None:
    """What the parent of the module ``name`` does instead of calling it; None where nothing is known against it."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if (
        isinstance(parent, nn.MultiheadAttention)
        and type(parent).forward is nn.MultiheadAttention.forward
        and child == "out_proj"
    ):
        return (
            "nn.MultiheadAttention reads its weight and never calls it; target the layers around the attention instead"
        )
    if (
        isinstance(parent, nn.TransformerEncoderLayer)
        and type(parent).forward is nn.TransformerEncoderLayer.forward
        and child in ("linear1", "linear2")
        and _may_take_the_fast_path(parent)
    ):
        return (
            "nn.TransformerEncoderLayer reads its weight in evaluation and never calls it then; call "
            "torch.backends.mha.set_fastpath_enabled(False) before adapting or loading the model"
        )
    return _refused_by_peft(model, child)


def warn_of_left_out(model: nn.Module, names: Iterable[str]) -> None:
    """``UserWarning`` that target_modules='all-linear' does not adapt these layers, and why."""
    reasons: dict[str | None, list[str]] = {}
    for name in sorted(names):
        reasons.setdefault(why_never_called(model, name), []).append(name)
    for reason, left_out in reasons.items():
        warnings.warn(
            f"target_modules: 'all-linear' leaves out {', '.join(left_out)}: an adapter there would not be heeded, as "
            f"{reason}.",
            stacklevel=2,
        )


def warn_of_aliases(model: nn.Module, names: Iterable[str]) -> None:
    """``UserWarning`` where a targeted module has several names: PEFT puts the adapter under the first alone."""
    places: dict[int, list[str]] = {}
    for parent_name, parent in model.named_modules():
        for child, module in parent._modules.items():
            if module is not None:
                places.setdefault(id(module), []).append(f"{parent_name}.{child}" if parent_name else child)
    for name in names:
        found = places.get(id(model.get_submodule(name)), [])
        if len(found) > 1:
            warnings.warn(
                f"target_modules: {name!r} is the same module as {', '.join(repr(f) for f in found if f != name)}: "
                "PEFT puts the adapter under the first name, and what is called by another does not get it. Leave it "
                "out, or give each place a module of its own.",
                stacklevel=2,
            )


def _may_take_the_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether nothing about the layer itself forbids the fused kernel, as its ``forward`` decides."""
    attention = layer.self_attn
    return bool(
        torch.backends.mha.get_fastpath_enabled()
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
    )


def _refused_by_peft(model: nn.Module, child: str) -> str | None:
    """PEFT's own list, of models whose kernels are handed a weight (Mamba's); it asks the list for LoRA only."""
    as_lora: Any = SimpleNamespace(peft_type="LORA")
    try:
        _check_lora_target_modules_mamba(as_lora, model, child)
    except ValueError:
        kind = getattr(model.config, "model_type", None)
        return f"models of type {kind!r} hand its weight to a kernel and need not call it; target other layers"
    return None


@contextmanager
def watched(layers: Iterable[tuple[str, AdaptedLayer]]) -> Iterator[dict[str, Seen]]:
    """Within: what happens to each of the layers, by name. A layer whose adapters are off or merged is left out."""
    seen = {}
    chosen = [(name, layer) for name, layer in layers if layer.adds_adapters()]
    for name, layer in chosen:
        seen[name] = layer.seen = Seen()
    try:
        yield seen
    finally:
        for _, layer in chosen:
            layer.seen = None


def warn_of_unused(seen: dict[str, Seen], training: bool) -> None:
    """``RuntimeWarning`` naming the layers whose weight was read and that were not called.

    No error: a layer that this batch had no use for (an expert, a dropped layer) may have had its dtype looked at.
    """
    unused = [name for name, what in seen.items() if what.weight_read and not what.called]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(
            f"target_modules: the model, {'training' if training else 'in evaluation'}, read the weight of "
            f"{', '.join(unused[:3])}{more} and did not call the layer, so that its adapter did nothing. If it is so "
            "for every batch, leave it out by target_modules or exclude_modules.",
            RuntimeWarning,
            stacklevel=4,
        )

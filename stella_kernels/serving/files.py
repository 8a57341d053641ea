"""Folders in, folders out: a StelLA adapter as LoRA, and a LoRA adapter as StelLA. No base model, no PEFT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..nn.masters import in_full_precision
from . import factored
from .adapter_files import PREFIX, Settings, read_adapter, write_adapter
from .export import LoraReport, lora_adapter, rounded, scale_of
from .factored import Factored
from .lora_import import lora_layers, stella_adapter

_SIDES = {"U": "columns", "S": None, "Vt": "rows", "U0": "columns", "Vt0": "rows"}


def export_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    rank: int | float | None = None,
    dtype: torch.dtype = torch.float32,
    rank_pattern: bool = False,
    also: Sequence[str] = (),
) -> LoraReport:
    """Write the StelLA adapter of one folder as a LoRA adapter into another; exact where ``rank`` is None.

    Args:
        source: the folder of a StelLA adapter, by ``save_pretrained`` of ours or of the published package.
        target: the folder to write; created where it is missing.
        rank: None, or what to cut to: a whole number, or (a float) the share of the squared singular values to keep.
        dtype: of the tensors written: float32, bfloat16, float16 or float64.
        rank_pattern: keep ranks that differ, by ``rank_pattern`` and ``alpha_pattern``, which PEFT reads and llama.cpp
            does not; by default smaller ones are filled up with zeros to one rank.
        also: those of 'bias', 'layer_replication', 'modules_to_save' and 'trainable_token_indices' to write for PEFT;
            few servers read them.

    Returns:
        What was written: the rank, for vLLM's ``--max-lora-rank``, and the layers' own.

    Raises:
        FileNotFoundError: ``source`` holds no adapter.
        ValueError: it holds another kind of adapter, a tensor that is none of StelLA's, or extras not in ``also``;
            ``target`` is ``source``; a number overflows ``dtype``. Nothing was written.
        NonFiniteError: a factor holds NaN or an infinity. Nothing was written.
    """
    _check_apart(source, target)
    settings, tensors = read_adapter(source, "STELLA")
    layers, others = stella_layers(settings, tensors)
    lora, written, report = lora_adapter(layers, settings, rank=rank, dtype=dtype, rank_pattern=rank_pattern, also=also)
    if others and not report.extras:
        raise ValueError(f"{source}: found {sorted(others)[0]!r} among the tensors, wanted factors of StelLA only.")
    write_adapter(target, lora, {**written, **{key: rounded(value, dtype, key) for key, value in others.items()}})
    return report


def import_adapter(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, diagonal: bool = False
) -> dict[str, int]:
    """Write the LoRA adapter of one folder as a StelLA adapter of the same rank into another, to go on training it.

    Args:
        source: the folder of a LoRA adapter that PEFT saved.
        target: the folder to write; created where it is missing.
        diagonal: store S as its singular values (``stella_diag_s``), with U and V turned to match.

    Returns:
        The rank by layer: LoRA's, or the smaller side of the layer where that is less.

    Raises:
        FileNotFoundError: ``source`` holds no adapter.
        ValueError: it is no plain LoRA (DoRA, a convolution with groups, a start that changed the
            base weights, …; the message names the field or the tensor), or ``target`` is ``source``. Nothing was
            written.
        NonFiniteError: a matrix holds NaN or an infinity. Nothing was written.
    """
    _check_apart(source, target)
    settings, tensors = read_adapter(source, "LORA")
    layers, kinds, others = lora_layers(settings, tensors)
    stella, written, ranks = stella_adapter(layers, kinds, settings, diagonal=diagonal)
    write_adapter(target, stella, {**written, **others})
    return ranks


def stella_layers(settings: Settings, tensors: dict[str, Tensor]) -> tuple[dict[str, Factored], dict[str, Tensor]]:
    """The layers of a StelLA adapter by module name, in float64, and the tensors that are no factors.

    Raises:
        ValueError: a factor's partner is missing, or there is no factor at all.
    """
    kinds: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        name, mark, kind = key.removesuffix(".weight").rpartition(".stella_")
        if mark and kind in _SIDES:
            # as loading into a model does: what half precision rounded off its manifold goes back to it
            whole = in_full_precision(tensor, torch.promote_types(tensor.dtype, torch.float32), _SIDES[kind])
            kinds.setdefault(name.removeprefix(PREFIX), {})[kind] = whole
        else:
            others[key] = tensor
    if not kinds:
        raise ValueError("the adapter: found no tensor named '….stella_U.weight', wanted the factors of StelLA.")
    for name in kinds:  # PEFT saves an adapted embedding's own weight, which is the base model's
        others.pop(f"{PREFIX}{name}.base_layer.weight", None)
    layers = {}
    for name, found in kinds.items():
        if not {"U", "S", "Vt"} <= set(found) or ("U0" in found) != ("Vt0" in found):
            raise ValueError(
                f"{name}: found the factors {sorted(found)}, wanted U, S and Vt, and U0 and Vt0 or neither."
            )
        start = (found["U0"], found["Vt0"]) if "U0" in found else None
        layers[name] = factored.from_stella(found["U"], found["S"], found["Vt"], scale_of(settings, name), start)
    return layers, others


def _check_apart(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"target: found {target}, the folder of the adapter itself, wanted another one.")

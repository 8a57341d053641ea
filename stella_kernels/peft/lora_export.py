"""A model's StelLA adapter as a LoRA adapter: PEFT's ``convert_to_lora`` and ``save_as_lora``, from the factors.

PEFT's own take an SVD of every (m, n) update. The factors give the same adapter exactly, at the cost of r × r products.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from ..serving import factored
from ..serving.adapter_files import PREFIX, write_adapter
from ..serving.export import LoraReport, lora_adapter, lora_layer, rounded
from ..serving.factored import Factored
from ..serving.layer_kinds import FIELD
from .layer import StellaLayer, adapter_layers
from .registration import PREFIX as OURS


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    rank_pattern: bool = False,
    also: Sequence[str] = (),
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter of ``model`` as a LoRA: the configuration and the tensors, as PEFT's function of that name.

    ``A = Vᵀ`` and ``B = s U S``, with the scale that is set now; ``[Vᵀ; V0ᵀ]`` and ``s [U S, −U0]``, of rank 2r, for an
    adapter that starts as 'pseudo_zero'. Products are taken in float64 and rounded once.

    Args:
        model: a PEFT model, or one that an adapter was injected into. Merged adapters are converted too.
        rank: None is exact. A whole number or (a float) a share of the squared singular values cuts each layer,
            optimally; a whole number that is no less than the exact rank is exact.
        adapter_name: the adapter.
        progressbar, compile_kwargs: taken as PEFT's function does, and unused: there is nothing to wait for.
        dtype: of the tensors: float32, bfloat16, float16 or float64.
        rank_pattern: keep ranks that differ, which PEFT reads and llama.cpp does not; by default smaller ones are
            filled up with zeros to one rank.
        also: those of 'bias', 'layer_replication', 'modules_to_save' and 'trainable_token_indices' to write for PEFT;
            few servers read them.

    Returns:
        The ``peft.LoraConfig``, with ``r`` the rank of the result and a scale of 1, and the tensors on their devices,
        by PEFT's names.

    Raises:
        TypeError: an argument of the wrong type, or the model has no StelLA layer, or layers of another method too.
        ValueError: there is no such adapter, it has extras not in ``also``, its factors are on the meta device, or a
            number overflows ``dtype``.
        NonFiniteError: a factor holds NaN or an infinity.
    """
    config, tensors, _ = _converted(model, rank, adapter_name, dtype, rank_pattern, also)
    return config, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    rank_pattern: bool = False,
    also: Sequence[str] = (),
) -> LoraReport:
    """Write an adapter of ``model`` as a LoRA adapter, which loads without this package, into the folder ``path``.

    The arguments and errors of ``convert_to_lora``; nothing is written where one is raised.

    Returns:
        What was written: the rank, for vLLM's ``--max-lora-rank``, and the layers' own.
    """
    config, tensors, report = _converted(model, rank, adapter_name, dtype, rank_pattern, also)
    settings = config.to_dict()
    # of an adapter that was injected into a bare model the names lack the prefix that files have
    named = {key if key.startswith(PREFIX) else PREFIX + key: tensor for key, tensor in tensors.items()}
    write_adapter(path, settings, named)
    return report


def layer_factors(model: nn.Module, adapter_name: str) -> dict[str, Factored]:
    """``s (U S Vᵀ − U0 V0ᵀ)`` of every layer that has the adapter, by the module's name in ``model``, float64.

    Raises:
        TypeError: the model has no StelLA layer.
        ValueError: no layer has this adapter, or its factors are on the meta device.
    """
    return {
        name: factored.from_stella(*layer.factors(adapter_name), layer.scaling[adapter_name], layer.start(adapter_name))
        for name, layer in adapter_layers(model, adapter_name).items()
    }


def teach_conversion() -> None:
    """Have PEFT's own ``convert_to_lora`` and ``save_as_lora`` take StelLA's layers from their factors, once.

    PEFT asks nobody which rank a layer has: where the one rank that it is given is too small, it would cut in silence.
    """
    try:
        from peft.tuners.lora import conversion
    except ImportError:  # PEFT before 0.19 converts nothing
        return
    original = conversion._convert_module_to_lora
    if getattr(original, "knows_stella", False):
        return

    @functools.wraps(original)
    def convert(module: Any, rank: int | float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
        if isinstance(module, StellaLayer):
            return _one_layer(module, rank, adapter_name)
        result: tuple[Tensor, Tensor, int] = original(module, rank, adapter_name)
        return result

    convert.knows_stella = True  # type: ignore[attr-defined]
    conversion._convert_module_to_lora = convert


@torch.compiler.disable
@torch.no_grad()
def _one_layer(layer: StellaLayer, rank: int | float, adapter_name: str) -> tuple[Tensor, Tensor, int]:
    """A, B and their rank, as PEFT wants them of a layer: of ``rank`` rows where that is a whole number."""
    if adapter_name not in layer.stella_U:  # PEFT leaves out a layer of rank 0
        return torch.empty(0, layer.in_features), torch.empty(layer.out_features, 0), 0
    factors = layer.factors(adapter_name)
    product = factored.from_stella(*factors, layer.scaling[adapter_name], layer.start(adapter_name))
    A, B = lora_layer("the adapter", product, rank)
    if isinstance(rank, int):
        if rank < product.rank:
            _, values, _ = factored.singular(product)
            lost = float(values[rank:].norm())
            # what rounding of the terms alone leaves: left and right are orthonormal
            if lost > product.rank * torch.finfo(factors[0].dtype).eps * float(product.core.norm()):
                raise ValueError(
                    f"rank: found {rank} for a layer of {layer.in_features} inputs and {layer.out_features} outputs "
                    f"whose adapter has rank {product.rank}: {lost / float(values.norm()):.1%} of its norm would be "
                    f"lost. Pass rank={product.rank} or more, or use stella_kernels.peft.save_as_lora, whose rank=None "
                    "is exact and whose rank cuts on purpose."
                )
        missing = rank - len(A)
        A, B = torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
    dtype = factors[0].dtype
    return A.to(dtype).contiguous(), B.to(dtype).contiguous(), len(A)


def _converted(
    model: nn.Module,
    rank: int | float | None,
    adapter_name: str,
    dtype: torch.dtype,
    rank_pattern: bool,
    also: Sequence[str],
) -> tuple[LoraConfig, dict[str, Tensor], LoraReport]:
    layers = layer_factors(model, adapter_name)
    prefix = PREFIX if all(name.startswith(PREFIX) for name in layers) else ""
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    described = {} if config is None else config.to_dict()
    adapted = adapter_layers(model, adapter_name)
    described[FIELD] = {name.removeprefix(prefix): layer.kind for name, layer in adapted.items()}
    plain = {name.removeprefix(prefix): layer for name, layer in layers.items()}
    settings, tensors, report = lora_adapter(
        plain, described, rank=rank, dtype=dtype, rank_pattern=rank_pattern, also=also
    )
    if not prefix:
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    if report.extras and hasattr(model, "peft_config"):
        saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        # a copy each: tied weights share memory, which no file can
        others = {key: value.clone() for key, value in saved.items() if f".{OURS}" not in key}
        tensors.update({key: rounded(value, dtype, key) for key, value in others.items()})
    return LoraConfig(**{key: value for key, value in settings.items() if key != "peft_type"}), tensors, report

"""Weighted sums of adapters: exact, of the sum of their ranks, or cut to a rank by the SVD of a small core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_finite_number, check_whole_number
from ..serving import factored
from ..serving.factored import Factored
from .config import StellaConfig
from .layer import StellaLayer
from .lora_export import layer_factors

COMBINATIONS = ("cat", "svd")

Factors = tuple[Tensor, Tensor, Tensor]


def check_combination(
    configs: dict[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """Raise ``TypeError``, ``ValueError`` or ``NotImplementedError``, with the argument, for what has no sum."""
    if adapter_name in configs:
        raise ValueError(
            f"adapter_name: found {adapter_name!r}, which exists already; delete it first, or choose another."
        )
    if isinstance(adapters, str) or not adapters or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters: found {adapters!r}, wanted a list of different names of adapters.")
    if unknown := [name for name in adapters if name not in configs]:
        raise ValueError(f"adapters: found {unknown}, wanted some of {sorted(configs)}.")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: found {len(weights)} for {len(adapters)} adapters, wanted one each.")
    for weight in weights:
        check_finite_number("weights", weight)
    if combination_type not in COMBINATIONS:
        raise NotImplementedError(
            f"combination_type: found {combination_type!r}, wanted 'cat' or 'svd': the others combine A with A and B "
            "with B, or drop single elements, which leaves no orthonormal factors."
        )
    if svd_rank is not None:
        check_whole_number("svd_rank", svd_rank)
        if combination_type != "svd":
            raise ValueError(f"svd_rank: found {svd_rank} with combination_type={combination_type!r}, wanted 'svd'.")
    for name in adapters:
        if configs[name].modules_to_save:
            raise ValueError(
                f"adapters: {name!r} has modules_to_save={configs[name].modules_to_save}, of which there is no sum; "
                "load it without them, or merge the model."
            )


def combined_factors(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
    diagonal: bool,
) -> dict[str, Factors]:
    """U, S and Vᵀ of ``Σ w_i s_i U_i S_i V_iᵀ`` by layer, float64; of the layers that have any of the adapters.

    Args:
        svd_rank: of 'svd'; None is the largest rank of the adapters summed.
        diagonal: S as a vector.
    """
    parts: dict[str, list[tuple[float, Factored]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, layer in layer_factors(model, adapter).items():
            parts.setdefault(name, []).append((weight, layer))
    largest = max(part.rank for each in parts.values() for _, part in each)
    found: dict[str, Factors] = {}
    for name, each in parts.items():
        total = factored.weighted_sum([part for _, part in each], [weight for weight, _ in each])
        if combination_type == "svd" or diagonal:
            left, values, right = factored.singular(total)
            kept = min(svd_rank or largest, len(values)) if combination_type == "svd" else len(values)
            core = values[:kept]
            found[name] = left[:, :kept], core if diagonal else torch.diag(core), right[:kept]
        else:
            total = factored.orthonormalised(total)
            found[name] = total.left, total.core, total.right
    return found


def combined_config(config: StellaConfig, ranks: dict[str, int], diagonal: bool) -> StellaConfig:
    """The configuration of the sum, of scale 1: that of the first adapter, on the layers ``ranks`` and no others."""
    r = max(ranks.values())
    return replace(
        config,
        r=r,
        lora_alpha=r,
        use_rslora=False,
        target_modules=sorted(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != r},
        stella_diag_s=diagonal,
        init_lora_weights=False,
        layer_replication=None,
    )


def set_factors(layer: StellaLayer, adapter: str, factors: Factors) -> None:
    """Put the sum into a layer that has a new adapter of its shape; it is not trained until it is set active."""
    layer.replace_factors(adapter, *factors, lora_alpha=layer.lora_alpha[adapter])
    for parameter in layer.factors(adapter):
        parameter.requires_grad_(False)

"""Cutting the rank of an adapter: since U and V are orthonormal, the SVD of S (r × r) is the SVD of the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...checks import NonFiniteError, check_whole_number
from ...serving import factored
from ...serving.adapter_files import PREFIX
from ...serving.export import by_name
from ..config import StellaConfig
from ..layer import StellaLayer, adapter_layers
from .moments import Turn, check_moments, renew, turn_moments

# The largest ‖QᵀQ − I‖ at which turning a factor's basis still counts as a rotation: bfloat16's round-off at rank 64.
_ORTHOGONAL = 0.1


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """The SVD of a layer's S, or of its whole update where it subtracts a start: what a cut is made of."""

    layer: StellaLayer
    values: Tensor  # (k,) descending, without the scale
    left: Tensor  # (r, k), of the columns of U; or (m, k), of an update with a start
    right: Tensor  # (r, k), of the columns of V; or (k, n)
    distance: float = 0.0  # ‖QᵀQ − I‖ of the factors

    def sizes(self, adapter: str) -> Tensor:
        """The singular values of what the layer adds."""
        return abs(self.layer._configured_scaling(adapter)) * self.values


@torch.no_grad()
def reduce_rank(
    model: nn.Module,
    rank: int | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    adapter_name: str = "default",
    optimizer: Optimizer | None = None,
) -> dict[str, int]:
    """Cut an adapter of ``model`` to lower ranks, in place and optimally: each layer to its truncated SVD.

    ``U ← U P``, ``S ← diag(σ)``, ``V ← V Q`` of ``S = P diag(σ) Qᵀ``, with the smallest σ left out, at the cost of
    r × r problems. A layer that keeps its rank is left as it is. One that starts as 'pseudo_zero' takes its start into
    the factors, at rank 2r before the cut. The configuration follows (``rank_pattern``, and ``alpha_pattern`` so that
    no scale changes), and the parameters stay the same objects.

    Args:
        model: a PEFT model.
        rank: the largest rank of any layer.
        energy: the share (0, 1] of its squared singular values that each layer keeps at least.
        budget: the sum of the ranks of all layers: the largest singular values of all updates ``s U S Vᵀ`` together
            are kept, and one of each layer at least.
        adapter_name: the adapter.
        optimizer: one that trains the factors, also wrapped by Accelerate: its moments follow the rotation and the cut
            (``ranks.moments`` says how), and its geometry, attached or its own, begins anew at the new factors.

    Returns:
        The rank of each layer, by name.

    Raises:
        TypeError: an argument of the wrong type, or the model has no StelLA layer.
        ValueError: not exactly one of ``rank``, ``energy`` and ``budget``; an unknown or merged adapter; a budget of
            less than one a layer; an optimizer with state that cannot follow. Nothing was changed.
        NonFiniteError: a factor holds NaN or an infinity. Nothing was changed.
    """
    _check_choice_of_cut(rank, energy, budget)
    layers = adapter_layers(model, adapter_name)
    if merged := [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise ValueError(f"adapter_name: {adapter_name!r} is merged into {merged[0]}; call unmerge_adapter() first.")
    spectra = {name: _spectrum(name, layer, adapter_name) for name, layer in layers.items()}
    if rank is not None:
        kept = {name: min(rank, len(one.values)) for name, one in spectra.items()}
    elif energy is not None:
        kept = {name: factored.rank_for_energy(one.values, energy) for name, one in spectra.items()}
    else:
        assert budget is not None
        kept = _within_budget({name: one.sizes(adapter_name) for name, one in spectra.items()}, budget)
    cut = {name: one for name, one in spectra.items() if kept[name] < len(one.values)}
    if optimizer is not None:
        joined = [name for name, one in cut.items() if one.layer.start(adapter_name) is not None]
        if joined:
            raise ValueError(
                f"optimizer: found one that trains {joined[0]}, which subtracts its start ('pseudo_zero'): no rotation "
                "of its moments belongs to the factors that take the start in. Train with init_lora_weights='zero', or "
                "cut after training, without the optimizer."
            )
        off = [name for name, one in cut.items() if one.distance > _ORTHOGONAL]
        if off:
            raise ValueError(
                f"optimizer: found one that trains {off[0]}, whose U or V is off its manifold (‖QᵀQ − I‖ = "
                f"{cut[off[0]].distance:.1e}), so that no rotation, which moments could follow, takes it "
                "to its singular vectors. Attach the geometry, or cut after training, without the optimizer."
            )
        turns = [turn for name, one in cut.items() for turn in _turns(name, one, kept[name], adapter_name)]
        check_moments(optimizer, turns)
        turn_moments(optimizer, turns)
    for name, one in cut.items():
        _cut(one, kept[name], adapter_name)
    if cut:
        config: Any = getattr(model, "peft_config", {}).get(adapter_name)
        if isinstance(config, StellaConfig):
            describe_ranks(config, layers, adapter_name)
        if optimizer is not None:
            renew(optimizer)
    return {name.removeprefix(PREFIX): layer.r[adapter_name] for name, layer in layers.items()}


def describe_ranks(config: StellaConfig, layers: Mapping[str, StellaLayer], adapter_name: str) -> None:
    """Have the configuration say of each layer the rank and the alpha that it has."""
    names = {name: name.removeprefix(PREFIX) for name in layers}
    ranks = {names[name]: layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {names[name]: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    config.r = max(ranks.values())
    widest = next(name for name, rank in ranks.items() if rank == config.r)
    config.lora_alpha = alphas[widest]  # type: ignore[assignment]  # PEFT's annotation; any number serves
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        config.rank_pattern, config.alpha_pattern = {}, {}
    else:
        config.rank_pattern, config.alpha_pattern = by_name(ranks, names.values()), by_name(alphas, names.values())


def _check_choice_of_cut(rank: int | None, energy: float | None, budget: int | None) -> None:
    given = {
        name: value for name, value in (("rank", rank), ("energy", energy), ("budget", budget)) if value is not None
    }
    if len(given) != 1:
        raise ValueError(f"rank, energy, budget: found {given or 'none'}, wanted exactly one of them.")
    for name, value in given.items():
        if name != "energy":
            check_whole_number(name, value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"energy: found {value!r}, wanted a number, above 0 and at most 1.")
        elif not 0 < value <= 1:
            raise ValueError(f"energy: found {value!r}, wanted a number, above 0 and at most 1.")


def _spectrum(name: str, layer: StellaLayer, adapter: str) -> _Spectrum:
    U, S, Vt = (factor.detach().double() for factor in layer.factors(adapter))
    if not all(bool(factor.isfinite().all()) for factor in (U, S, Vt)):
        raise NonFiniteError(f"{name}: its factors hold NaN or an infinity; nothing was changed.", [name])
    if (start := layer.start(adapter)) is not None:
        left, values, right = factored.singular(factored.from_stella(U, S, Vt, 1.0, start))
        return _Spectrum(layer, values, left, right)
    try:
        # U = Q Lᵀ: of a factor on its manifold L is I but for round-off, which nearly equal singular values magnify
        L_U, L_V = torch.linalg.cholesky(U.mT @ U), torch.linalg.cholesky(Vt @ Vt.mT)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{name}: the columns of U or V are linearly dependent, wanted a basis each.") from error
    P, values, Qt = torch.linalg.svd(L_U.mT @ (torch.diag(S) if S.dim() == 1 else S) @ L_V)
    left = torch.linalg.solve_triangular(L_U.mT, P, upper=True)
    right = torch.linalg.solve_triangular(L_V.mT, Qt.mT, upper=True)
    eye = torch.eye(len(values), dtype=torch.float64, device=U.device)
    distance = max(float((L @ L.mT - eye).norm()) for L in (L_U, L_V))
    return _Spectrum(layer, values, left, right, distance)


def _within_budget(sizes: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    if budget < len(sizes):
        raise ValueError(f"budget: found {budget} for {len(sizes)} layers, wanted at least one a layer.")
    # the first of each layer stays whatever its size
    rest = [(float(size), name) for name, values in sizes.items() for size in values[1:]]
    rest.sort(key=lambda each: each[0], reverse=True)
    kept = dict.fromkeys(sizes, 1)
    for _, name in rest[: budget - len(sizes)]:
        kept[name] += 1
    return kept


def _turns(name: str, one: _Spectrum, kept: int, adapter: str) -> list[Turn]:
    U, S, Vt = one.layer.factors(adapter)
    left, right = one.left[:, :kept], one.right[:, :kept]
    return [
        Turn(U, f"{name}.stella_U", None, left),
        # a diagonal S is turned as what it is, so that only the diagonal of the gradient's turn is known
        Turn(S, f"{name}.stella_S", left * right) if S.dim() == 1 else Turn(S, f"{name}.stella_S", left, right),
        Turn(Vt, f"{name}.stella_Vt", right),
    ]


def _cut(one: _Spectrum, kept: int, adapter: str) -> None:
    layer = one.layer
    values = one.values[:kept]
    core = values if layer.factors(adapter)[1].dim() == 1 else torch.diag(values)
    if layer.start(adapter) is not None:
        U, Vt = one.left[:, :kept], one.right[:kept]
    else:
        U, Vt = (turn(turn.parameter.detach()) for turn in _turns("", one, kept, adapter)[::2])
    share = kept / layer.r[adapter]
    alpha = layer.lora_alpha[adapter] * (math.sqrt(share) if layer.use_rslora[adapter] else share)
    layer.replace_factors(adapter, U, core, Vt, alpha)

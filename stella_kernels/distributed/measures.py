"""How far sharded factors are from their manifolds, and back to them: no factor is gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..nn import StiefelFactor
from ..operators.status import STATUS_OK
from .reduction import calls_of, summed
from .retraction import polish, retract_held
from .rows import Rows
from .verdict import verdict

_kernels = torch.ops.stella_kernels


@torch.no_grad()
def distances(factors: Sequence[StiefelFactor]) -> list[float]:
    """``‖YᵀY − I‖`` of each, NaN of one that is not finite; one collective, to be called by every process."""
    rows = [Rows(factor) for factor in factors]
    calls = calls_of(rows)
    held = [_held(each) for each in rows]
    sums, _ = summed(calls, [_kernels.gradient_gram(*call.chosen(held, held)) for call in calls])
    return verdict(calls, sums, False).drifts


@torch.no_grad()
def retract(factors: Sequence[StiefelFactor]) -> list[str]:
    """Replace each by its orthogonal polar factor; names of those that have none, their columns being dependent.

    To be called by every process. Where one has none, nothing is changed.
    """
    rows = [Rows(factor) for factor in factors]
    held = [_held(each).clone() for each in rows]
    info = polish(rows, held, retract_held(rows, held))
    if bad := [each.name for each, found in zip(rows, info.tolist(), strict=True) if found[0] != STATUS_OK]:
        return bad
    for each, tensor in zip(rows, held, strict=True):
        parameter: Any = each.factor.parameter
        each.put(tensor, parameter.detach())
    return []


def _held(rows: Rows) -> torch.Tensor:
    parameter: Any = rows.factor.parameter
    return rows.of(parameter.detach())

"""How far factors are from their manifolds, of sharded ones too, and those back to them: no factor is gathered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..nn import StiefelFactor
from ..operators.status import STATUS_OK
from .reduction import calls_of, summed
from .retraction import polish, retract_held
from .rows import Rows, is_sharded
from .verdict import drifts, verdict

_kernels = torch.ops.stella_kernels


@torch.no_grad()
def distances(factors: Sequence[StiefelFactor]) -> list[float]:
    """``‖YᵀY − I‖_F`` of each, not finite of one that is not; in float32 at least.

    An operator call for each device and dtype: hundreds one by one take five times as long. Sharded factors take one
    collective besides, and every process has to call this with them.
    """
    found = [math.nan] * len(factors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    sharded: list[int] = []
    for i, factor in enumerate(factors):
        p = factor.parameter
        (sharded if is_sharded(p) else kinds.setdefault((p.device, p.dtype), [])).append(i)
    for places in kinds.values():
        views = [factors[i].view for i in places]
        sums = _kernels.gradient_gram(views, views)
        for i, drift in zip(places, drifts(sums, [Y.shape[1] for Y in views]), strict=True):
            found[i] = drift
    if sharded:
        rows = [Rows(factors[i]) for i in sharded]
        calls = calls_of(rows)
        held = [_held(each) for each in rows]
        totals, _ = summed(calls, [_kernels.gradient_gram(*call.chosen(held, held)) for call in calls])
        for i, drift in zip(sharded, verdict(calls, totals, False).drifts, strict=True):
            found[i] = drift
    return found


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

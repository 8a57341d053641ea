"""What the sums over all rows say of a step before anything is written: the same on every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NoReturn

import torch
from torch import Tensor

from ..checks import NonFiniteError
from ..operators.status import sums_words
from .reduction import Call


@dataclass
class Verdict:
    """Of the factors of a step, in their order.

    Attributes:
        drifts: ``‖YᵀY − I‖_F`` as the step begins, NaN of a value that is not finite.
        values: places of factors that hold NaN or an infinity.
        gradients: places of gradients that do.
        large: places of finite gradients that may overflow: ``‖∇‖_F + 2 ‖∇ᵀY‖_F``, a bound on the elements of
            ``∇ − Y ∇ᵀY`` for ``‖Y‖₂ ≤ 2``, or for AdamW its square, is above half of what the dtype holds.
    """

    drifts: list[float]
    values: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    large: list[int] = field(default_factory=list)


def refuse_values(names: Sequence[str]) -> NoReturn:
    """Raise ``NonFiniteError`` for factors whose value is not finite, on every process."""
    raise NonFiniteError(
        f"the value of {', '.join(names)} holds NaN or an infinity on some process, found as optimizer.step() began, "
        "and no other batch helps. Nothing was changed by this step; load a sound checkpoint.",
        names,
    )


def verdict(calls: Sequence[Call], sums: Sequence[Tensor], squares: bool) -> Verdict:
    """Read the sums, each once: a GPU is waited for."""
    count = sum(len(call.rows) for call in calls)
    found = Verdict([0.0] * count)
    for call, flat in zip(calls, sums, strict=True):
        most = torch.finfo(call.rows[0].factor.parameter.dtype).max / 2
        for r, places, block in _blocks(flat, [rows.r for rows in call.rows], call.places):
            _judge(found, block, r, places, math.sqrt(most) if squares else most)
    for places in (found.values, found.gradients, found.large):
        places.sort()
    return found


def drifts(sums: Tensor, ranks: Sequence[int]) -> list[float]:
    """``‖YᵀY − I‖_F`` of factors with these ranks, read from their ``sums``; a GPU is waited for."""
    return [d for r, _, block in _blocks(sums, ranks, range(len(ranks))) for d in _drift(block, r).tolist()]


def _blocks(flat: Tensor, ranks: Sequence[int], places: Sequence[int]) -> Iterator[tuple[int, Sequence[int], Tensor]]:
    """Rank, places and sums (k, words) of consecutive factors of one rank."""
    here = flat.double().cpu()
    begin = first = 0
    for r, run in groupby(ranks):
        k, words = len([*run]), sums_words(r)
        yield r, places[first : first + k], here[begin : begin + k * words].view(k, words)
        first, begin = first + k, begin + k * words


def _drift(block: Tensor, r: int) -> Tensor:
    i, j = torch.triu_indices(r, r, device="cpu")
    once = torch.where(i == j, 1.0, 2.0).double()  # how often an element of the triangle is in the whole
    return ((block[:, r * r : -1] - (i == j).double()).square() * once).sum(1).sqrt()


def _judge(found: Verdict, block: Tensor, r: int, places: Sequence[int], most: float) -> None:
    K, norm = block[:, : r * r], block[:, -1]
    drift = _drift(block, r)
    bound = norm + 2.0 * torch.linalg.vector_norm(K, dim=1)
    rows = zip(places, drift.tolist(), norm.tolist(), bound.tolist(), strict=True)
    for place, drift_of, norm_of, bound_of in rows:
        found.drifts[place] = drift_of
        if not math.isfinite(drift_of):
            found.values.append(place)
        if not math.isfinite(norm_of):
            found.gradients.append(place)
        elif not bound_of <= most and math.isfinite(drift_of):
            found.large.append(place)

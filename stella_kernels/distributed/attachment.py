"""What ``attach`` does around a step with factors whose rows are spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn import StiefelFactor
from ..operators.status import DRIFT
from .adamw import Begun, begin
from .reduction import summed
from .retraction import info_of, polish
from .rows import Rows

_kernels = torch.ops.stella_kernels


class ShardedFactors:
    """Those of an attachment, and the step under way.

    Attributes:
        active: of all the attachment's factors, the places of those that have a gradient in this step.
        factors: the factors at these places.
    """

    def __init__(self) -> None:
        self._rows: list[Rows] = []
        self._places: list[int] = []
        self._divisors: list[float] = []
        self.active: list[int] = []
        self._taken: list[int] = []  # of ``_rows``
        self._begun: Begun | None = None
        self._snapshots: list[Tensor] = []

    def add(self, place: int, factor: StiefelFactor, divisor: float) -> None:
        """This one too."""
        self._rows.append(Rows(factor))
        self._places.append(place)
        self._divisors.append(divisor)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def everyone(self) -> list[StiefelFactor]:
        """All of them."""
        return [rows.factor for rows in self._rows]

    @property
    def factors(self) -> list[StiefelFactor]:
        return [self._rows[i].factor for i in self._taken]

    def begin(self, cores: Sequence[Any]) -> Begun | None:
        """The first sums, of factors that have a gradient and of ``cores``' gradients; nothing is written."""
        self._taken = [i for i, rows in enumerate(self._rows) if rows.factor.parameter.grad is not None]
        self.active = [self._places[i] for i in self._taken]
        self._begun = begin([self._rows[i] for i in self._taken], False, cores) if self._taken else None
        self._snapshots = []
        return self._begun

    def rewrite(self) -> None:
        """∇ ← ∇ − Y ∇ᵀ Y, and the factors as they are now are kept."""
        begun = self._begun
        if begun is None:
            return
        self._snapshots = [torch.empty_like(held) for held in begun.held]
        for call, sums in zip(begun.calls, begun.sums, strict=True):
            _kernels.riemannian_gradient_rows_(*call.chosen(begun.gradients, begun.held, self._snapshots), sums)
        for rows, gradient in zip(begun.rows, begun.gradients, strict=True):
            grad: Any = rows.factor.parameter.grad
            rows.put(gradient, grad)

    def retract(self) -> Tensor:
        """Scale, project and retract what the optimizer moved; info, a row for each active factor."""
        begun = self._begun
        assert begun is not None
        parameters: list[Any] = [rows.factor.parameter.detach() for rows in begun.rows]
        moved = [rows.of(p) for rows, p in zip(begun.rows, parameters, strict=True)]
        own = []
        for call in begun.calls:
            divisors = [self._divisors[self._taken[i]] for i in call.places]
            own.append((*call.chosen(moved, self._snapshots), divisors))
        grams, _ = summed(begun.calls, [_kernels.retract_gram(*given) for given in own])
        infos = [
            _kernels.retract_rows_(*given, sums, gram) for given, sums, gram in zip(own, begun.sums, grams, strict=True)
        ]
        info = polish(begun.rows, moved, info_of(begun.calls, infos))
        for rows, tensor, p in zip(begun.rows, moved, parameters, strict=True):
            rows.put(tensor, p)
        info[:, DRIFT] = torch.tensor(begun.verdict.drifts, dtype=torch.float64)
        return info

    def restore(self) -> None:
        """Give the factors their values before the step."""
        if self._begun is None:
            return
        for rows, snapshot in zip(self._begun.rows, self._snapshots, strict=False):
            parameter: Any = rows.factor.parameter
            rows.put(snapshot, parameter.detach())

    def end(self) -> None:
        """The step is over."""
        self._begun, self._snapshots = None, []

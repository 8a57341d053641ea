"""Where factors lie and what they were before the step: views, snapshots, and the groups that one call can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import OffManifoldError
from ..nn import StiefelFactor
from ..operators.memory import has_memory

Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype, torch.device]


def place_of(parameter: Tensor) -> Place:
    """Where a parameter lies, and how: another one when its memory was exchanged, by ``p.data = …`` for example."""
    return parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype, parameter.device


class Memory:
    """The memory of factors, followed from step to step.

    Attributes:
        views: (n, r) each, the parameters' own memory.
    """

    def __init__(self) -> None:
        self.views: list[Tensor] = []
        self._factors: list[StiefelFactor] = []
        self._places: list[Place] = []
        self._snapshots: list[Tensor | None] = []  # reused by every step
        self._grouped: tuple[list[int], list[list[int]]] = ([], [])  # factors last grouped, and their groups

    def add(self, factors: Iterable[StiefelFactor]) -> None:
        """These too."""
        for factor in factors:
            self._factors.append(factor)
            self.views.append(factor.view)
            self._places.append(place_of(factor.parameter))
            self._snapshots.append(None)
        self._grouped = ([], [])

    def follow(self, indices: Sequence[int]) -> None:
        """Renew the views of parameters that were given other memory, by ``model.to(...)`` or ``p.data = …``.

        Raises:
            OffManifoldError: a parameter has lost its memory.
        """
        for i in indices:
            factor = self._factors[i]
            place = place_of(factor.parameter)
            # the view is asked too: storage that it points to may have been freed, and its address given out again
            if place != self._places[i] or place[0] != self.views[i].data_ptr() or place[0] == 0:
                if not has_memory(factor.parameter) or factor.parameter.shape != self._places[i][1]:
                    raise OffManifoldError(
                        f"{factor.name}: found shape {tuple(factor.parameter.shape)} with a storage of "
                        f"{factor.parameter.untyped_storage().nbytes()} bytes, wanted {tuple(self._places[i][1])} in "
                        "memory: something took it away within optimizer.step(), as an offload does. Keep the "
                        "constrained factors in memory until the step is over.",
                        [factor.name],
                    )
                self.views[i], self._places[i] = factor.view, place
                self._grouped = ([], [])

    def snapshot(self, index: int) -> Tensor:
        """Where a factor's value before the step is kept, as the factor lies now; its value moves along.

        An optimizer that exchanges the parameter's memory within its step (``p.data = …``) may change device, dtype and
        strides as well; the value before the step is needed all the more.
        """
        kept, view = self._snapshots[index], self.views[index]
        if kept is None:
            kept = self._snapshots[index] = torch.empty_like(view)
        elif (kept.dtype, kept.device, kept.stride()) != (view.dtype, view.device, view.stride()):
            kept = self._snapshots[index] = torch.empty_like(view).copy_(kept)
        return kept

    def restore(self, indices: Sequence[int]) -> None:
        """Give factors their values before the step, wherever they lie now."""
        self.follow(indices)
        for i in indices:
            self.views[i].copy_(self.snapshot(i))

    def forget(self) -> None:
        """Free the snapshots."""
        self._snapshots = [None] * len(self._factors)

    def groups(self, indices: list[int]) -> list[list[int]]:
        """The factors that one operator call can take: same device, same dtype. Remembered from step to step."""
        if self._grouped[0] == indices:
            return self._grouped[1]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in indices:
            groups.setdefault((self.views[i].device, self.views[i].dtype), []).append(i)
        self._grouped = (indices, list(groups.values()))
        return self._grouped[1]

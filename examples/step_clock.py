"""Where the time of one training step goes: forward and backward, optimizer, geometry."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch


@dataclass(frozen=True)
class Split:
    """Median seconds of one step."""

    forward_backward: float
    optimizer: float
    geometry: float

    @property
    def total(self) -> float:
        return self.forward_backward + self.optimizer + self.geometry


class StepClock:
    """Times the geometry apart from the optimizer that carries it in its step hooks.

    Hooks run in the order of their registration, so time stamps registered before and after the geometry's own hooks
    enclose them, on both sides of ``optimizer.step()``:

        with clock.around(optimizer):
            attachment = attach(optimizer, model)
    """

    def __init__(self) -> None:
        self._stamps: list[float] = []
        self._splits: list[Split] = []

    def _stamp(self, *_: object) -> None:
        self._stamps.append(perf_counter())

    @contextmanager
    def around(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Enclose the hooks that are registered on ``optimizer`` inside the ``with`` block."""
        optimizer.register_step_pre_hook(self._stamp)
        optimizer.register_step_post_hook(self._stamp)
        yield
        optimizer.register_step_pre_hook(self._stamp)
        optimizer.register_step_post_hook(self._stamp)

    def start(self) -> None:
        """Mark the beginning of a step's forward pass."""
        self._stamps = [perf_counter()]

    def finish(self) -> None:
        """Record the step that ``start`` began, after ``optimizer.step()``."""
        if len(self._stamps) != 5:
            raise RuntimeError(
                f"StepClock: found {len(self._stamps)} time stamps, wanted 5: start and one optimizer.step()."
            )
        begin, before, ready, moved, done = self._stamps
        self._splits.append(Split(before - begin, moved - ready, (ready - before) + (done - moved)))

    def median(self) -> Split:
        """The median of each part; the first step, which warms up, is left out where there are others."""
        splits = self._splits[1:] or self._splits
        return Split(
            statistics.median(split.forward_backward for split in splits),
            statistics.median(split.optimizer for split in splits),
            statistics.median(split.geometry for split in splits),
        )

    def forget(self) -> None:
        """The steps recorded so far."""
        self._splits.clear()

"""What a step costs: milliseconds, what is kept for the backward pass, what is trained and what the optimizer holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from torch import Tensor

from bench.accuracy.run import BATCH, Case, build, loss_of
from bench.accuracy.tasks import Task
from bench.common.saved import saved_bytes


class Priced:
    """A method at work on the first examples of a task."""

    def __init__(self, task: Task, method: str, rank: int) -> None:
        self.task, self.method, self.rank = task, method, rank
        self.model, self.optimizer = build(Case(task.name, "price", method, rank, 1e-3, 0), task)
        self.model.train()
        self.seconds: list[float] = []
        self.kept = 0

    def step(self) -> None:
        """One step, timed; the first also counts what is kept."""
        task, model = self.task, self.model
        x, mask = task.x[:BATCH], None if task.mask is None else task.mask[:BATCH]

        def forward() -> Tensor:
            return loss_of(task, model(x, mask), task.y[:BATCH])

        begin = time.perf_counter()
        if self.kept:
            loss = forward()
        else:
            known = [x, *model.parameters(), *model.buffers()]
            loss, self.kept = saved_bytes(forward, known if mask is None else [*known, mask])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begin)

    def line(self) -> str:
        """A row of the table."""
        step = 1e3 * statistics.median(self.seconds[2:])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        held = sum(_bytes(p) + sum(_bytes(t) for t in self.optimizer.state[p].values()) for p in trained)
        held += sum(_bytes(p) for p in trained)  # the gradients
        name, rank = self.method, self.rank or "-"
        return f"| {name} | {rank} | {step:.1f} | {self.kept / 1e6:.2f} | {held / 1e6:.2f} |"


def _bytes(t: object) -> int:
    return t.numel() * t.element_size() if isinstance(t, Tensor) else 0


def price(task: Task, chosen: Sequence[tuple[str, str, int]], steps: int = 30) -> str:
    """A table as Markdown: the methods take their steps in turn, so that what else the machine does slows all."""
    priced = [Priced(task, method, rank) for name, method, rank in chosen if name == task.name]
    for _ in range(steps):
        for each in priced:
            each.step()
    header = [f"| {task.name} | r | ms a step | kept for backward, MB | trained, gradients, moments, MB |"]
    return "\n".join([*header, "|---|--:|--:|--:|--:|", *(each.line() for each in priced)])

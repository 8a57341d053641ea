"""The optimizer step for a Llama-3-8B's factors: StellaAdamW, attach, the published hooks, unconstrained AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench.common.device import CPU
from bench.common.roofline import BOUNDS_HEADER, FactorsRow, bounds_columns
from bench.common.shapes import LLAMA_3_8B, layers_on
from bench.common.timing import Verdict, interleaved_samples, machine_of, machine_probes, milliseconds, paired_ratio
from bench.stiefel.model import OPTIMIZERS, copies, llama_factors
from bench.stiefel.step_memory import measure_extra_bytes

# 21 million elements (10 at r = 4): 84 MB of each of factors, gradients and both moments, far out of cache.
LAYERS = {4: 32, 8: 32, 16: 16, 32: 8, 64: 4, 128: 2}
# For memory, of which scratch does not grow with the model: as much of its 32 layers as fits a small
# machine, at some of the ranks.
MEMORY_LAYERS = {4: 32, 8: 32, 32: 16, 128: 16}

ADAMW_BYTES = 28  # an element: read Y, ∇, m, v, write Y, m, v
WANTED_OVER_ADAMW = {8: 2.5, 16: 4.0, 32: 7.0}  # r: at most so many times AdamW (fused)
WANTED_UNDER_PUBLISHED = {8: 10.0, 16: 15.0, 32: 7.0}  # r: at least so many times faster
WANTED_EXTRA_MEMORY = 0.05  # of the factors' size, at most
WANTED_GUARD = {8: 0.02, 32: 0.02}  # of the step, at most

FORMULA = (
    f"floor of a step: {ADAMW_BYTES} bytes an element over the copy bandwidth (AdamW's own) plus 12 r flops an element "
    "over the peak product: ∇ᵀY 2r, Y K 2r, the Gram of [Y, Δ] half of 8r, the update 4r.\n"
    "roofline: the larger of the two instead of their sum, as if memory and arithmetic overlapped without loss.\n"
    "guard: of StellaAdamW's step, the time in which it asks who moved a factor (optim/guard.py, optim/roster.py)."
)


@dataclass(frozen=True)
class Row(FactorsRow):
    """One rank of the optimizers' steps; extra bytes, AdamW's own too, over ``memory_layers`` layers."""

    ours = "stella_adamw"
    bytes_per_element = ADAMW_BYTES

    guard: float  # part of StellaAdamW's step
    memory_layers: int
    extra_bytes: dict[str, int]  # empty where it was not measured

    @property
    def flops_per_element(self) -> float:
        return 12 * self.r + 2  # see ``FORMULA``; the Gram's diagonal makes the 2

    def over_adamw(self, name: str) -> float:
        return paired_ratio(self.samples, name, "adamw")

    @property
    def under_published(self) -> float:
        return paired_ratio(self.samples, "published", "stella_adamw")

    def extra_memory(self, name: str) -> float:
        """Bytes beyond torch's AdamW, relative to the factors of the same layers; NaN where not measured."""
        factors = 4 * self.memory_layers * LLAMA_3_8B.rows * self.r
        return (self.extra_bytes[name] - self.extra_bytes["adamw"]) / factors if self.extra_bytes else float("nan")

    def as_dict(self) -> dict[str, object]:
        """The row as plain JSON types."""
        return {
            **super().as_dict(),
            "samples": self.samples,
            "ratio_to_adamw": {name: self.over_adamw(name) for name in self.samples},
            "published_over_stella_adamw": self.under_published,
            "guard": self.guard,
            "memory_layers": self.memory_layers,
            "extra_bytes": self.extra_bytes,
        }


class _Stopwatch:
    """The seconds that each step spends in some methods of some objects, those inside one another once."""

    def __init__(self, *methods: tuple[Any, str]) -> None:
        self.spent, self._inside = 0.0, False
        for owner, name in methods:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return method(*arguments, **named)
            self._inside, start = True, perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.spent += perf_counter() - start
                self._inside = False

        return call


def _timed(layers: int, r: int, seconds: float, device: torch.device) -> tuple[dict[str, list[float]], float]:
    """Seconds of each optimizer's steps, on copies of the same factors and gradients, and the guard's part of ours."""
    factors = llama_factors(layers, r, torch.Generator().manual_seed(r), device)
    gradients = [f.parameter.grad for f in factors]
    owned = {name: copies(factors) for name in OPTIMIZERS}
    optimizers = {name: build(owned[name]) for name, build in OPTIMIZERS.items()}

    def prepare(name: str) -> None:
        if name in owned:  # attach and the published hooks rewrite the gradients
            torch._foreach_copy_([f.parameter.grad for f in owned[name]], gradients)

    ours: Any = optimizers["stella_adamw"]
    guard = [(ours._guard, name) for name in ("before_step", "judge", "after_step")]
    watch = _Stopwatch(*guard, *((ours._roster, name) for name in ("check_held", "newcomers", "check_moving")))
    guarded: list[float] = []

    def watched_step() -> None:
        watch.spent = 0.0
        ours.step()
        guarded.append(watch.spent)

    steps: dict[str, Callable[[], Any]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    steps["stella_adamw"] = watched_step
    samples = interleaved_samples({**machine_probes(device), **steps}, seconds, prepare, device=device)
    return samples, median(guarded) / median(samples["stella_adamw"])


def measure(r: int, seconds: float, with_memory: bool, device: torch.device = CPU) -> Row:
    """Time every optimizer at rank r for about ``seconds`` in all, then measure their memory."""
    timed_layers = layers_on(device, r, LAYERS)
    samples, guard = _timed(timed_layers, r, seconds, device)
    machine = machine_of(samples, device)
    samples = {name: samples[name] for name in OPTIMIZERS}
    layers = MEMORY_LAYERS.get(r, 0) if with_memory else 0
    extra = {name: measure_extra_bytes(name, layers, r, device) for name in OPTIMIZERS if layers}
    return Row(r, timed_layers, samples, machine, guard, layers, extra)


HEADER = (
    f"{'r':>4} {'layers':>6} | {'AdamW fused':>12} {'StellaAdamW':>18} {'attach':>18} {'published hooks':>20} | "
    f"{'publ./Stella':>12} {'guard':>6} | {BOUNDS_HEADER} | "
    "memory beyond AdamW's: Stella, attach, published"
)


def table_row(row: Row) -> str:
    """One line of the table on the terminal: milliseconds, and times AdamW."""
    times = " ".join(
        f"{milliseconds(row.seconds(name), width, 1)} ms ×{row.over_adamw(name):5.2f}"
        for name, width in (("stella_adamw", 8), ("attach", 8), ("published", 10))
    )
    memory = "not measured"
    if row.extra_bytes:
        parts = ", ".join(f"{row.extra_memory(name):.1%}" for name in ("stella_adamw", "attach", "published"))
        memory = f"{parts} of the factors of {row.memory_layers} layers"
    return (
        f"{row.r:4d} {row.layers:6d} | {milliseconds(row.seconds('adamw'), 9, 1)} ms {times} | "
        f"{row.under_published:12.1f} {row.guard:6.1%} | {bounds_columns(row)} | {memory}"
    )


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """What the package promises of the whole step, each with whether this run bore it out."""
    for row in rows:
        if row.r in WANTED_OVER_ADAMW:
            found, wanted = row.over_adamw("stella_adamw"), WANTED_OVER_ADAMW[row.r]
            yield Verdict(
                found <= wanted,
                f"r = {row.r}: StellaAdamW costs {found:.2f} × AdamW (fused), wanted at most {wanted:g}",
            )
        if row.r in WANTED_GUARD:
            found, wanted = row.guard, WANTED_GUARD[row.r]
            text = f"r = {row.r}: the guard takes {found:.1%} of the step, wanted at most {wanted:.0%}"
            yield Verdict(found <= wanted, text)
        if row.r in WANTED_UNDER_PUBLISHED:
            found, wanted = row.under_published, WANTED_UNDER_PUBLISHED[row.r]
            text = f"r = {row.r}: {found:.1f} times faster than the published hooks, wanted {wanted:g}"
            yield Verdict(found >= wanted, text)
    measured = [row for row in rows if row.extra_bytes]
    if measured:
        worst = max(measured, key=lambda row: row.extra_memory("stella_adamw"))
        found = worst.extra_memory("stella_adamw")
        yield Verdict(
            found < WANTED_EXTRA_MEMORY,
            f"memory of a StellaAdamW step beyond AdamW's at most {found:.1%} of the factors (at r = {worst.r}), "
            f"wanted under {WANTED_EXTRA_MEMORY:.0%}",
            timed=False,
        )

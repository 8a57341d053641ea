"""Project-and-retract for a Llama-3-8B's factors, against the best compositions of torch calls and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.common.device import CPU
from bench.common.roofline import BOUNDS_HEADER, FactorsRow, bounds_columns
from bench.common.shapes import layers_on
from bench.common.timing import Verdict, interleaved_samples, machine_of, machine_probes, milliseconds, paired_ratio
from bench.stiefel import compositions
from bench.stiefel.model import llama_factors
from bench.stiefel.polar import STEP_NORM

LAYERS = {4: 16, 8: 16, 16: 8, 32: 4, 64: 2, 128: 1}  # 42 MB of factors
DIVISOR = 1.3
WANTED_OF_FLOOR = {16: 0.6, 32: 0.6, 64: 0.6}  # r: at least
WANTED_OVER_BEST = 2.0

RETRACT_BYTES = 12  # an element: read the old and the moved factor, write the new one
FORMULA = (
    f"floor: {RETRACT_BYTES} bytes an element over the copy bandwidth plus 8 r flops an element over the peak product "
    "(the Gram of [Y, Δ], half of 8r, and the update, 4r); roofline: the larger of the two."
)


@dataclass(frozen=True)
class Row(FactorsRow):
    """One rank of project-and-retract."""

    ours = "native"
    bytes_per_element = RETRACT_BYTES

    @property
    def flops_per_element(self) -> float:
        return 8 * self.r + 2  # see ``FORMULA``; the Gram's diagonal makes the 2

    @property
    def best_composition(self) -> str:
        return min(compositions.RETRACT, key=self.seconds)

    @property
    def over_best(self) -> float:
        return paired_ratio(self.samples, self.best_composition, "native")

    def as_dict(self) -> dict[str, object]:
        """The row as plain JSON types."""
        return {
            **super().as_dict(),
            "best_composition": self.best_composition,
            "ratio_to_best_composition": self.over_best,
        }


def _run_all(run: Callable[[Tensor, Tensor, float], Tensor], stacks: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [run(Y, moved, DIVISOR) for Y, moved in stacks]


def measure(r: int, seconds: float, device: torch.device = CPU) -> Row:
    """Time every candidate for about ``seconds``.

    The native operator takes the factors as a model holds them, of both storages, and writes in place; the
    compositions get theirs stacked by shape beforehand, and need not write anything back.
    """
    layers = layers_on(device, r, LAYERS)
    generator = torch.Generator().manual_seed(r)
    previous = [factor.view for factor in llama_factors(layers, r, generator, device)]
    moved = []
    for Y in previous:
        step = torch.empty_like(Y, device=CPU).normal_(generator=generator).to(device)
        norm = torch.linalg.eigvalsh(step.mT @ step)[-1].sqrt()
        moved.append(step.mul_(DIVISOR * STEP_NORM / norm).add_(Y))
    work = [torch.empty_like(M) for M in moved]
    by_height: dict[int, list[int]] = {}
    for index, Y in enumerate(previous):
        by_height.setdefault(Y.shape[0], []).append(index)
    stacks = [
        (torch.stack([previous[i] for i in group]), torch.stack([moved[i] for i in group]))
        for group in by_height.values()
    ]
    divisors = [DIVISOR] * len(work)

    def prepare(name: str) -> None:
        if name == "native":
            torch._foreach_copy_(work, moved)

    candidates: dict[str, Callable[[], object]] = {
        "native": lambda: torch.ops.stella_kernels.project_retract_(work, previous, divisors, "auto"),
        **{name: partial(_run_all, run, stacks) for name, run in compositions.RETRACT.items()},
    }
    samples = interleaved_samples({**machine_probes(device), **candidates}, seconds, prepare, device=device)
    return Row(r, layers, {name: samples[name] for name in candidates}, machine_of(samples, device))


_COLUMNS = {"svd": "svd", "gram_eigh": "eigh", "gram_newton_schulz": "N-S", "one_reduction": "N-S, one reduction"}
HEADER = (
    f"{'r':>4} {'layers':>6} | {'native':>8} "
    + " ".join(f"{title:>{max(8, len(title))}}" for title in _COLUMNS.values())
    + f" ms | {'×best torch':>11} | {BOUNDS_HEADER}"
)


def table_row(row: Row) -> str:
    """One line of the table on the terminal."""
    times = " ".join(milliseconds(row.seconds(name), max(8, len(title)), 1) for name, title in _COLUMNS.items())
    native = milliseconds(row.seconds("native"), 8, 2)
    return f"{row.r:4d} {row.layers:6d} | {native} {times}    | {row.over_best:11.2f} | {bounds_columns(row)}"


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """What the package promises of project-and-retract, each with whether this run bore it out."""
    for row in rows:
        wanted = WANTED_OF_FLOOR.get(row.r)
        if wanted is not None:
            found = (
                f"project-and-retract reaches {row.of_floor:.0%} of the floor ({row.of_roofline:.0%} of the roofline)"
            )
            yield Verdict(row.of_floor >= wanted, f"r = {row.r}: {found}, wanted {wanted:.0%}")
    for row in rows:
        found = f"project-and-retract is {row.over_best:.2f} times faster than the best torch composition"
        yield Verdict(
            row.over_best >= WANTED_OVER_BEST,
            f"r = {row.r}: {found} ({row.best_composition}), wanted {WANTED_OVER_BEST:g}",
        )

"""A row of the tables of factor sets: what one candidate of ours takes, against the bounds of memory and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from bench.common.shapes import LLAMA_3_8B
from bench.common.timing import Machine


@dataclass(frozen=True)
class FactorsRow:
    """One rank: seconds of each candidate over a Llama-3-8B's factors of ``layers`` layers.

    A subclass says which candidate the bounds are for, and what an element of the factors costs it.
    """

    ours: ClassVar[str]
    bytes_per_element: ClassVar[int]

    r: int
    layers: int
    samples: dict[str, list[float]]
    machine: Machine  # in the same rounds

    @property
    def flops_per_element(self) -> float:
        raise NotImplementedError

    @property
    def elements(self) -> int:
        return self.layers * LLAMA_3_8B.rows * self.r

    def seconds(self, name: str) -> float:
        return median(self.samples[name])

    @property
    def memory_seconds(self) -> float:
        return self.elements * self.bytes_per_element / self.machine.bandwidth

    @property
    def arithmetic_seconds(self) -> float:
        return self.elements * self.flops_per_element / self.machine.flops

    @property
    def of_floor(self) -> float:
        """The sum of both bounds, as a part of what was taken."""
        return (self.memory_seconds + self.arithmetic_seconds) / self.seconds(self.ours)

    @property
    def of_roofline(self) -> float:
        """The larger of both bounds, as a part of what was taken."""
        return max(self.memory_seconds, self.arithmetic_seconds) / self.seconds(self.ours)

    def as_dict(self) -> dict[str, object]:
        """The row as plain JSON types."""
        return {
            "r": self.r,
            "layers": self.layers,
            "elements": self.elements,
            "seconds": {name: self.seconds(name) for name in self.samples},
            "peak_flops": self.machine.flops,
            "copy_bandwidth": self.machine.bandwidth,
            "floor_memory_seconds": self.memory_seconds,
            "floor_arithmetic_seconds": self.arithmetic_seconds,
            "fraction_of_floor": self.of_floor,
            "fraction_of_roofline": self.of_roofline,
        }


BOUNDS_HEADER = f"{'of floor':>8} {'of roofline':>11} {'peak':>5} {'copy':>5}"


def bounds_columns(row: FactorsRow) -> str:
    """A row's part of the table under :data:`BOUNDS_HEADER`: GFLOP/s and GB/s last."""
    peak, copy = row.machine.flops / 1e9, row.machine.bandwidth / 1e9
    return f"{row.of_floor:8.0%} {row.of_roofline:11.0%} {peak:5.0f} {copy:5.0f}"

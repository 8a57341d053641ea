"""Timing on a machine that does other things too: interleaved candidates, medians, floors measured beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

MIN_ROUNDS = 5
MAX_ROUNDS = 50


def interleaved_medians(
    candidates: Mapping[str, Callable[[], object]], seconds: float, min_rounds: int = MIN_ROUNDS
) -> dict[str, float]:
    """Median seconds of each candidate, called in turn for about ``seconds`` in all.

    A disturbance on the machine then falls on every candidate alike. The first round warms up and is not counted.
    """
    for run in candidates.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end = perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= min_rounds and perf_counter() > end:
            break
        for name, run in candidates.items():
            start = perf_counter()
            run()
            samples[name].append(perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


@dataclass(frozen=True)
class Machine:
    """What this machine reaches in this very process."""

    flops: float  # float32 matrix product, per second
    bandwidth: float  # copy, bytes read and written per second
    threads: int

    def floor(self, batch: int, n: int, r: int) -> float:
        """The least seconds a polar factor of (batch, n, r) float32 can take.

        Arithmetic: the symmetric Gram, n r (r + 1), and its application, 2 n r². Memory: one read and one write.
        """
        flops = batch * n * (r * (r + 1) + 2 * r * r)
        bytes_moved = 2 * 4 * batch * n * r
        return max(flops / self.flops, bytes_moved / self.bandwidth)


def measure_machine(size: int = 2048, megabytes: int = 128) -> Machine:
    """Measure the peak matrix product (``size`` cubed) and copy bandwidth: the best of several, being bounds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    product = torch.empty(size, size)
    source = torch.randn(megabytes * 2**20 // 4)
    target = torch.empty_like(source)

    def best(run: Callable[[], object], rounds: int = 8) -> float:
        run()
        times = []
        for _ in range(rounds):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        return min(times)

    return Machine(
        flops=2.0 * size**3 / best(lambda: torch.mm(a, b, out=product)),
        bandwidth=2.0 * 4 * source.numel() / best(lambda: target.copy_(source)),
        threads=torch.get_num_threads(),
    )

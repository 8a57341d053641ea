"""Timing on a machine that does other things too: interleaved candidates, medians, floors measured beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

MIN_ROUNDS = 5
MAX_ROUNDS = 50


def interleaved_samples(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    prepare: Callable[[str], object] | None = None,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, called in turn for about ``seconds`` in all.

    A disturbance on the machine then falls on every candidate alike. The first round warms up and is not counted;
    nor is ``prepare``, called with the candidate's name before each of its calls.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end = perf_counter() + seconds
    for done in range(-1, MAX_ROUNDS):
        if done >= min_rounds and perf_counter() > end:
            break
        for name, run in candidates.items():
            if prepare is not None:
                prepare(name)
            start = perf_counter()
            run()
            if done >= 0:
                samples[name].append(perf_counter() - start)
    return samples


def interleaved_medians(candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each candidate of :func:`interleaved_samples`."""
    return {name: statistics.median(values) for name, values in interleaved_samples(candidates, seconds).items()}


def paired_ratio(samples: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds of the ratio of two candidates: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(samples[above], samples[below], strict=True))


@dataclass(frozen=True)
class Machine:
    """What this machine reaches in this very process."""

    flops: float  # float32 matrix product, per second
    bandwidth: float  # copy, bytes read and written per second
    threads: int

    def __str__(self) -> str:
        return f"{self.threads} threads, {self.flops / 1e9:.0f} GFLOP/s, {self.bandwidth / 1e9:.0f} GB/s"

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

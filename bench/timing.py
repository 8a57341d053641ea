"""Timing on a machine that does other things too: interleaved candidates, medians, floors measured beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

MIN_ROUNDS = 5
FEWEST_ROUNDS = 3  # where a busy machine makes those take four times as long as they may
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
    begin = perf_counter()
    for done in range(-1, MAX_ROUNDS):
        elapsed = perf_counter() - begin
        if (done >= min_rounds and elapsed > seconds) or (done >= FEWEST_ROUNDS and elapsed > 4 * seconds > 0):
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


PRODUCT, COPY = "peak product", "copy"  # names among a row's candidates
_SIZE = 2048
_COPIED = 64 * 2**20 // 4  # elements: out of cache


def machine_probes() -> dict[str, Callable[[], object]]:
    """The peak matrix product and the copy, as candidates to run among others, so that both see the same machine."""
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    product = torch.empty(_SIZE, _SIZE)
    source = torch.randn(_COPIED)
    target = torch.empty_like(source)
    return {PRODUCT: lambda: torch.mm(a, b, out=product), COPY: lambda: target.copy_(source)}


def machine_of(samples: Mapping[str, list[float]]) -> Machine:
    """What the probes among the samples reached: the best of them, being bounds."""
    return Machine(
        flops=2.0 * _SIZE**3 / min(samples[PRODUCT]),
        bandwidth=2.0 * 4 * _COPIED / min(samples[COPY]),
        threads=torch.get_num_threads(),
    )


def measure_machine() -> Machine:
    """The peak matrix product and copy bandwidth, alone."""
    return machine_of(interleaved_samples(machine_probes(), 0.0, min_rounds=8))

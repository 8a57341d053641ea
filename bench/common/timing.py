"""Timing on a machine that does other things too: interleaved candidates, medians, floors measured beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch

from bench.common.device import CPU, clock_of, description, tf32_allowed, three_of_tf32

MIN_ROUNDS = 5
FEWEST_ROUNDS = 3  # where a busy machine makes those take four times as long as they may
MAX_ROUNDS = 50


def interleaved_samples(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    prepare: Callable[[str], object] | None = None,
    min_rounds: int = MIN_ROUNDS,
    device: torch.device = CPU,
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate on ``device``, called in turn for about ``seconds`` in all.

    A disturbance on the machine then falls on every candidate alike. The first round warms up and is not counted;
    nor is ``prepare``, called with the candidate's name before each of its calls.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    seconds_of = clock_of(device)
    begin = perf_counter()
    for done in range(-1, MAX_ROUNDS):
        if done == 0 and device.type == "cuda":
            begin = perf_counter()  # the warm-up compiled kernels and tuned them, for minutes perhaps
        elapsed = perf_counter() - begin
        if (done >= min_rounds and elapsed > seconds) or (done >= FEWEST_ROUNDS and elapsed > 4 * seconds > 0):
            break
        for name, run in candidates.items():
            if prepare is not None:
                prepare(name)
            taken = seconds_of(run)
            if done >= 0:
                samples[name].append(taken)
    return samples


def interleaved_medians(
    candidates: Mapping[str, Callable[[], object]], seconds: float, device: torch.device = CPU
) -> dict[str, float]:
    """Median seconds of each candidate of :func:`interleaved_samples`."""
    samples = interleaved_samples(candidates, seconds, device=device)
    return {name: statistics.median(values) for name, values in samples.items()}


def milliseconds(seconds: float, width: int, decimals: int) -> str:
    """As a table shows them: so many decimals, or as many as two digits take."""
    two = 1 - math.floor(math.log10(1e3 * seconds))
    return f"{1e3 * seconds:{width}.{max(decimals, two)}f}"


def paired_ratio(samples: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds of the ratio of two candidates: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(samples[above], samples[below], strict=True))


class Verdict(NamedTuple):
    """Whether a run bore a promise out, and whether it is one about time."""

    met: bool
    text: str
    timed: bool = True


@dataclass(frozen=True)
class Machine:
    """What this machine reaches in this very process."""

    flops: float  # float32 matrix product, per second
    bandwidth: float  # copy, bytes read and written per second
    where: str  # the GPU and its float32 products, or the threads of a CPU

    def __str__(self) -> str:
        return f"{self.where}, {self.flops / 1e9:.0f} GFLOP/s, {self.bandwidth / 1e9:.0f} GB/s"

    def floor(self, batch: int, n: int, r: int) -> float:
        """The least seconds a polar factor of (batch, n, r) float32 can take.

        Arithmetic: the symmetric Gram, n r (r + 1), and its application, 2 n r². Memory: one read and one write.
        """
        flops = batch * n * (r * (r + 1) + 2 * r * r)
        bytes_moved = 2 * 4 * batch * n * r
        return max(flops / self.flops, bytes_moved / self.bandwidth)


PRODUCT, COPY = "peak product", "copy"  # names among a row's candidates
_SIZE = {"cpu": 2048, "cuda": 8192}  # of the product's matrices
_COPIED = {"cpu": 64 * 2**20 // 4, "cuda": 512 * 2**20 // 4}  # elements: out of cache


def machine_probes(device: torch.device = CPU) -> dict[str, Callable[[], object]]:
    """The peak matrix product and the copy, as candidates to run among others, so that both see the same machine."""
    size = _SIZE[device.type]
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    product = torch.empty(size, size, device=device)
    source = torch.randn(_COPIED[device.type], device=device)
    target = torch.empty_like(source)

    def multiply() -> torch.Tensor:
        with tf32_allowed() if three_of_tf32(device) else nullcontext():
            return torch.mm(a, b, out=product)

    return {PRODUCT: multiply, COPY: lambda: target.copy_(source)}


def machine_of(samples: Mapping[str, list[float]], device: torch.device = CPU) -> Machine:
    """What the probes among the samples reached: the best of them, being bounds."""
    products = 3 if three_of_tf32(device) else 1  # for one of float32
    return Machine(
        flops=2.0 * _SIZE[device.type] ** 3 / (products * min(samples[PRODUCT])),
        bandwidth=2.0 * 4 * _COPIED[device.type] / min(samples[COPY]),
        where=description(device),
    )


def measure_machine(device: torch.device = CPU) -> Machine:
    """The peak matrix product and copy bandwidth, alone."""
    return machine_of(interleaved_samples(machine_probes(device), 0.0, min_rounds=8, device=device), device)

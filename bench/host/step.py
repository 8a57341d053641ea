"""Host time of one optimizer step over the factors of a large model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.common.timing import Verdict
from bench.stiefel.model import OPTIMIZERS
from stella_kernels.nn import StiefelFactor

FACTORS, SIDE, RANK = 448, 32, 16  # as many as 32 layers of a Llama have in seven projections
NAMES = ("adamw", "stella_adamw", "attach")
KEPT = 24  # gradients of past steps that are still there, so that new ones lie elsewhere


@dataclass(frozen=True)
class Row:
    """Milliseconds of a step of each optimizer, the least of all rounds: gradients where they were, and elsewhere.

    ``addresses``: of asking each tensor of a step where it lies, once, in one call of ``map``: the floor of a step that
    trusts none of them.
    """

    same: dict[str, float]
    moved: dict[str, float]
    addresses: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"factors": FACTORS, "same_ms": self.same, "moved_ms": self.moved, "addresses_ms": self.addresses}


def _factors() -> list[StiefelFactor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(FACTORS):
        Q = torch.linalg.qr(torch.randn(SIDE, RANK, generator=generator)).Q
        parameter = torch.nn.Parameter(Q.mT.contiguous() if i % 2 else Q)
        found.append(StiefelFactor(parameter, bool(i % 2), f"factor {i}"))
    return found


def _give_gradients(factors: Sequence[StiefelFactor], held: list[list[torch.Tensor]]) -> None:
    held.append([torch.zeros_like(factor.parameter) for factor in factors])
    del held[:-KEPT]
    for factor, gradient in zip(factors, held[-1], strict=True):
        factor.parameter.grad = gradient


def measure(seconds: float) -> Row:
    """Optimizers in turn for about so long, after steps that compile and allocate."""
    every = {}
    for name in NAMES:
        factors, held = _factors(), list[list[torch.Tensor]]()
        _give_gradients(factors, held)
        every[name] = OPTIMIZERS[name](factors), factors, held
        for _ in range(3):
            every[name][0].step()
    same, moved = dict.fromkeys(NAMES, float("inf")), dict.fromkeys(NAMES, float("inf"))
    end, addresses = time.monotonic() + seconds, float("inf")
    asked = _tensors(*every["stella_adamw"][:2])
    while time.monotonic() < end:
        addresses = min(addresses, _asking(asked))
        for name, (optimizer, factors, held) in every.items():
            same[name] = min(same[name], _milliseconds(optimizer))
            _give_gradients(factors, held)
            moved[name] = min(moved[name], _milliseconds(optimizer))
            optimizer.step()
    return Row(same, moved, addresses)


def _tensors(optimizer: torch.optim.Optimizer, factors: Sequence[StiefelFactor]) -> list[torch.Tensor]:
    """Parameters, gradients, moments and counters, as a step reads them."""
    states = [optimizer.state[f.parameter] for f in factors]
    found = [f.parameter for f in factors], [f.parameter.grad for f in factors]
    kept = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    return [tensor for tensors in (*found, *kept) for tensor in tensors if tensor is not None]


def _asking(tensors: list[torch.Tensor]) -> float:
    begin = time.perf_counter()
    [*map(torch.Tensor.data_ptr, tensors)]
    return (time.perf_counter() - begin) * 1e3


def _milliseconds(optimizer: torch.optim.Optimizer) -> float:
    begin = time.perf_counter()
    optimizer.step()
    return (time.perf_counter() - begin) * 1e3


HEADER = f"{'gradients':<22}" + "".join(f"{name:>16}" for name in NAMES)


def table(row: Row) -> str:
    """Its two lines, and the floor of ours."""
    lines = (("where they were", row.same), ("elsewhere", row.moved))
    rows = "\n".join(f"{what:<22}" + "".join(f"{times[name]:>13.2f} ms" for name in NAMES) for what, times in lines)
    return f"{rows}\nasking {5 * FACTORS:,} tensors for their addresses, once: {row.addresses:.2f} ms"


def verdicts(row: Row) -> Iterator[Verdict]:
    """What the host may take for the step of a Llama-3-8B's factors."""
    for what, times, most in (("where they were", row.same, 0.5), ("elsewhere", row.moved, 1.0)):
        text = f"StellaAdamW, {FACTORS} factors, gradients {what}: {times['stella_adamw']:.2f} ms, {most} promised"
        yield Verdict(times["stella_adamw"] <= most, text)

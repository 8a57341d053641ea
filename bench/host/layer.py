"""Host time of one adapted layer, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bench.adapter.layer import Published
from bench.adapter.lora import lora
from bench.common.timing import Verdict
from stella_kernels.nn import StellaLinear

ROWS, SIDE, RANK = 4, 32, 16
DROPOUTS = (0.0, 0.1)
CALLS = 10  # of a layer, one after another: few, so that some run without a pause


LAYERS: dict[str, Callable[[nn.Linear, float], nn.Module]] = {
    "base": lambda base, dropout: base,
    # without masters, so that nothing is cast: the least that LoRA's host has to do
    "lora": lambda base, dropout: lora(base, RANK, dropout, masters=False),
    "published": lambda base, dropout: Published(base, RANK, dropout),
    "ours": lambda base, dropout: StellaLinear(base, r=RANK, dropout=dropout),
}


@dataclass(frozen=True)
class Row:
    """Microseconds of a forward and of a backward pass of each layer, the least of all rounds."""

    dropout: float
    forward: dict[str, float]
    backward: dict[str, float]

    def total(self, name: str) -> float:
        """Both passes."""
        return self.forward[name] + self.backward[name]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"dropout": self.dropout, "forward_us": self.forward, "backward_us": self.backward}


def _passes(layer: nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> tuple[float, float]:
    """Microseconds of a forward and of a backward pass, of some one after another."""
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    forward = backward = 0.0
    for _ in range(CALLS):
        begin = time.perf_counter()
        y = layer(x)
        between = time.perf_counter()
        y.backward(grad_y)
        end = time.perf_counter()
        forward, backward = forward + between - begin, backward + end - between
        for each in trained:
            each.grad = None
    return forward / CALLS * 1e6, backward / CALLS * 1e6


def measure(dropout: float, seconds: float) -> Row:
    """Layers in turn for about so long, after a first round that compiles."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, SIDE, dtype=torch.bfloat16, requires_grad=True)
    grad_y = torch.randn(ROWS, SIDE, dtype=torch.bfloat16)
    layers = {}
    for name, make in LAYERS.items():
        base = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layers[name] = make(base, dropout).train()
        _passes(layers[name], x, grad_y)
    forward, backward = dict.fromkeys(LAYERS, float("inf")), dict.fromkeys(LAYERS, float("inf"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, layer in layers.items():
            there, back = _passes(layer, x, grad_y)
            forward[name], backward[name] = min(forward[name], there), min(backward[name], back)
    return Row(dropout, forward, backward)


HEADER = f"{'dropout':>8}" + "".join(f"{name:>22}" for name in LAYERS) + f"{'ours / lora':>14}"


def table_row(row: Row) -> str:
    """A line of the table: forward + backward = both, of each layer."""
    cells = (f"{row.forward[n]:.0f} + {row.backward[n]:.0f} = {row.total(n):.0f}" for n in LAYERS)
    return f"{row.dropout:>8}" + "".join(f"{cell:>22}" for cell in cells) + f"{_ratio(row):>14.2f}"


def _ratio(row: Row) -> float:
    return row.total("ours") / row.total("lora")


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """That the host has no more to do than for LoRA."""
    for row in rows:
        if row.dropout:
            text = f"a layer with dropout: {_ratio(row):.2f} of the host time of LoRA, at most 1 promised"
            yield Verdict(_ratio(row) <= 1.0, text)

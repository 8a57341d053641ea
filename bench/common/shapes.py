"""The factor shapes of the models the bench speaks of.

A linear layer (m, n) of rank r owns a factor of m rows and one of n rows, so a model's factor heights are the widths
that occur in its attention and MLP projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RANKS = (4, 8, 16, 32, 64, 128)
MAX_BATCH = 64
MAX_ELEMENTS = 64 * 4096 * 32  # 32 MiB in float32: out of cache, yet a fraction of a second for the SVD


@dataclass(frozen=True)
class ModelShapes:
    """The widths of one transformer's linear layers."""

    name: str
    hidden: int
    mlp: int
    key_value: int

    @property
    def heights(self) -> tuple[int, ...]:
        """The distinct factor heights n, tallest first."""
        return tuple(sorted({self.hidden, self.mlp, self.key_value}, reverse=True))

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(m, n), out and in features, of each linear layer of one transformer layer."""
        hidden, mlp, key_value = self.hidden, self.mlp, self.key_value
        return {
            "q": (hidden, hidden),
            "k": (key_value, hidden),
            "v": (key_value, hidden),
            "o": (hidden, hidden),
            "gate": (mlp, hidden),
            "up": (mlp, hidden),
            "down": (hidden, mlp),
        }

    @property
    def rows(self) -> int:
        """The summed heights of the factors of one transformer layer."""
        return sum(m + n for m, n in self.projections.values())


MODELS = (
    ModelShapes("Llama-3-8B", hidden=4096, mlp=14336, key_value=1024),
    ModelShapes("Llama-2-7B", hidden=4096, mlp=11008, key_value=4096),
    ModelShapes("ViT-L", hidden=1024, mlp=4096, key_value=1024),
)
LLAMA_3_8B = MODELS[0]
LLAMA_3_8B_LAYERS = 32
# Layers times rank on a GPU: 84 million elements, 9 to 10 GiB with the states and gradients of four optimizers, the
# published stacks, the probes and the clock's memory; ranks under 32 reach fewer, so that --ranks 4 8 16 needs less.
MAX_LAYERS_RANK = 1024


def layers_on(device: torch.device, r: int, on_cpu: dict[int, int]) -> int:
    """Of a Llama-3-8B in a row of rank r: so many on a CPU, and on a GPU all that its memory should hold."""
    return min(LLAMA_3_8B_LAYERS, MAX_LAYERS_RANK // r) if device.type == "cuda" else on_cpu[r]


@dataclass(frozen=True)
class Case:
    """A batch of factors, (batch, n, r)."""

    batch: int
    n: int
    r: int
    models: tuple[str, ...]


def cases(ranks: tuple[int, ...] = RANKS) -> list[Case]:
    """Every distinct height of every model at every rank; the batch keeps the data to ``MAX_ELEMENTS``."""
    heights = sorted({n for model in MODELS for n in model.heights})
    return [
        Case(
            batch=min(MAX_BATCH, max(1, MAX_ELEMENTS // (n * r))),
            n=n,
            r=r,
            models=tuple(model.name for model in MODELS if n in model.heights),
        )
        for n in heights
        for r in ranks
    ]

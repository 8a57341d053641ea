"""The factors of a Llama-3-8B under StelLA, and the optimizers that the whole step is measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bench.common.device import CPU
from bench.common.shapes import LLAMA_3_8B
from bench.stiefel.published import PublishedGeometry
from stella_kernels.functional import polar
from stella_kernels.nn import StiefelFactor
from stella_kernels.optim import StellaAdamW, attach

LEARNING_RATE = 5e-4
HIDDEN_SIZE = float(LLAMA_3_8B.hidden)


def llama_factors(layers: int, r: int, generator: torch.Generator, device: torch.device = CPU) -> list[StiefelFactor]:
    """U (m, r) and Vᵀ (r, n) of all 7 projections of ``layers`` layers, orthonormal, with random gradients, float32.

    Drawn on the CPU, by its generator, so that every device has the same ones.
    """
    factors = []
    for layer in range(layers):
        for projection, (m, n) in LLAMA_3_8B.projections.items():
            for side, height in (("U", m), ("Vt", n)):
                Y = polar(torch.randn(height, r, generator=generator).to(device))
                parameter = nn.Parameter(Y.mT.contiguous() if side == "Vt" else Y)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
                factors.append(StiefelFactor(parameter, side == "Vt", f"{layer}.{projection}.{side}"))
    return factors


def copies(factors: Sequence[StiefelFactor]) -> list[StiefelFactor]:
    """The same factors and gradients in memory of their own."""
    copied = []
    for factor in factors:
        parameter = nn.Parameter(factor.parameter.detach().clone())
        assert factor.parameter.grad is not None
        parameter.grad = factor.parameter.grad.clone()
        copied.append(StiefelFactor(parameter, factor.transposed, factor.name))
    return copied


def _torch_adamw(factors: Sequence[StiefelFactor]) -> AdamW:
    return AdamW([f.parameter for f in factors], lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _stella_adamw(factors: Sequence[StiefelFactor]) -> Optimizer:
    parameters = [f.parameter for f in factors]
    return StellaAdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, factors=list(factors), grad_scaling=HIDDEN_SIZE)


def _attached(factors: Sequence[StiefelFactor]) -> Optimizer:
    optimizer = _torch_adamw(factors)
    attach(optimizer, list(factors), grad_scaling=HIDDEN_SIZE)
    return optimizer


def _published(factors: Sequence[StiefelFactor]) -> Optimizer:
    optimizer = _torch_adamw(factors)
    PublishedGeometry(optimizer, factors, HIDDEN_SIZE)
    return optimizer


# All but the first keep the factors on their manifolds.
OPTIMIZERS: dict[str, Callable[[Sequence[StiefelFactor]], Optimizer]] = {
    "adamw": _torch_adamw,
    "stella_adamw": _stella_adamw,
    "attach": _attached,
    "published": _published,
}

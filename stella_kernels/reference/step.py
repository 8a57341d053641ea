"""The published StelLA step around any torch optimizer, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import check_choice
from . import stiefel

GEOMETRIES = ("stiefel", "euclidean")


class Factor(Protocol):
    """A parameter that holds a tall factor (n, r), or its transpose where ``transposed``."""

    @property
    def parameter(self) -> torch.nn.Parameter: ...

    @property
    def transposed(self) -> bool: ...


def _tall(value: Tensor, transposed: bool) -> Tensor:
    """The (n, r) view of a stored factor, or of its gradient."""
    return value.mT if transposed else value


def _wide(value: Tensor) -> Tensor:
    """The value in a dtype that has factorisations: bfloat16 and float16 become float32."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


class PublishedStep:
    """One optimizer step on Stiefel manifolds, as published (StelLA, arXiv 2510.01938).

    For each factor Y (n, r) that has a gradient ∇: ``∇ ← ∇ − Y ∇ᵀ Y``; the optimizer moves Y to Ỹ; then
    ``Δ = (Ỹ − Y) / sqrt(n / d)``, ``Δ ← Δ − Y symm(YᵀΔ)``, ``Y ← retraction(Y, Δ)``.

    Args:
        optimizer: any torch optimizer that holds the factors.
        factors: objects with ``parameter`` (any float dtype and device) and ``transposed``; orthonormal (not checked).
        retraction: a key of ``stiefel.RETRACTIONS``.
        hidden_size: d above; None leaves the steps unscaled.
        geometry: 'stiefel', or 'euclidean' for the ablation with no constraint (the optimizer alone).

    Raises ``ValueError`` for a retraction, hidden size or geometry that does not exist.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factors: Sequence[Factor],
        retraction: str = "polar",
        hidden_size: float | None = None,
        geometry: str = "stiefel",
    ) -> None:
        check_choice("retraction", retraction, tuple(stiefel.RETRACTIONS))
        check_choice("geometry", geometry, GEOMETRIES)
        stiefel.gradient_scaling_divisor(1, hidden_size)  # raises now rather than at the first step
        self.optimizer = optimizer
        self.factors = list(factors) if geometry == "stiefel" else []
        self.retraction = retraction
        self.hidden_size = hidden_size

    @torch.no_grad()
    def step(self) -> None:
        """Take one step from the gradients that the parameters hold; factors without a gradient stay as they are."""
        active: list[tuple[Tensor, Tensor]] = []  # each factor as (n, r): the parameter's own memory, and a copy
        for factor in self.factors:
            gradient = factor.parameter.grad
            if gradient is None:
                continue
            Y, G = _tall(factor.parameter, factor.transposed), _tall(gradient, factor.transposed)  # (n, r)
            active.append((Y, Y.clone()))
            G.copy_(stiefel.riemannian_gradient(_wide(Y), _wide(G)))
        self.optimizer.step()
        for moved, Y in active:
            divisor = stiefel.gradient_scaling_divisor(Y.shape[0], self.hidden_size)
            moved.copy_(stiefel.project_retract(_wide(Y), _wide(moved), divisor, self.retraction))

"""The published StelLA step around any torch optimizer, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import check_choice
from . import quotient, stiefel

GEOMETRIES = ("stiefel", "euclidean", "quotient")


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
        geometry: 'stiefel', 'euclidean' for the ablation with no constraint (the optimizer alone), or 'quotient': the
            products U S Vᵀ move horizontally (see ``quotient``). The last needs factors that also have ``core``,
            the S (r, r) they share, and ``side``, 'left' for U and 'right' for V; both of each product, all with
            gradients.

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
        self.products = _products(factors) if geometry == "quotient" else []
        self.retraction = retraction
        self.hidden_size = hidden_size

    @torch.no_grad()
    def step(self) -> None:
        """Take one step from the gradients that the parameters hold; factors without a gradient stay as they are."""
        starts = [self._before_product(U, S, V) for U, S, V in self.products]
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
        for product, start in zip(self.products, starts, strict=True):
            self._after_product(*product, start)

    def _before_product(self, U: Factor, S: Tensor, V: Factor) -> quotient.Triple:
        """Make the gradients of U and V Riemannian (that of S is already); returns copies of the three."""
        gradients = [_tall(_gradient(f.parameter), f.transposed) for f in (U, V)]
        start = _tall(U.parameter, U.transposed).clone(), S.clone(), _tall(V.parameter, V.transposed).clone()
        point = _wide(start[0]), _wide(start[1]), _wide(start[2])
        euclidean = _wide(gradients[0]), _wide(_gradient(S)), _wide(gradients[1])
        riemannian = quotient.riemannian_gradient(point, euclidean)
        gradients[0].copy_(riemannian[0])
        gradients[1].copy_(riemannian[2])
        return start

    def _after_product(self, U: Factor, S: Tensor, V: Factor, start: quotient.Triple) -> None:
        """Put in place of the optimizer's move of the three its horizontal part, retracted."""
        stored = _tall(U.parameter, U.transposed), S, _tall(V.parameter, V.transposed)
        divisors = [stiefel.gradient_scaling_divisor(start[i].shape[0], self.hidden_size) for i in (0, 2)]
        point = _wide(start[0]), _wide(start[1]), _wide(start[2])
        moved = _wide(stored[0]), _wide(stored[1]), _wide(stored[2])
        new = quotient.project_retract(point, moved, divisors[0], divisors[1], self.retraction)
        for parameter, value in zip(stored, new, strict=True):
            parameter.copy_(value)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _products(factors: Sequence[Any]) -> list[tuple[Factor, Tensor, Factor]]:
    """(U, S, V) of each product among the factors, in the order of the Us."""
    right = {id(f.core): f for f in factors if f.side == "right"}
    return [(f, f.core, right[id(f.core)]) for f in factors if f.side == "left"]

"""The geometry of a StelLA step the way the published package runs it: the baseline of the speed figures.

Written from the formulas of arXiv 2510.01938 (section 3.2 of the design): factors of equal shape are stacked, so that
one batched ``torch.linalg.svd`` retracts them, and unstacked again; once before the optimizer step and once after it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from stella_kernels.nn import StiefelFactor


def svd_driver(M: Tensor) -> str | None:
    """The driver that the published code asks for: cuSOLVER's alone has it, and elsewhere torch's default serves."""
    return "gesvda" if M.is_cuda and torch.version.hip is None else None


class PublishedGeometry:
    """Attach the stacked, SVD-based geometry to ``optimizer``; ``remove()`` takes it off again.

    Args:
        optimizer: any torch optimizer that moves the factors.
        factors: the constrained factors, trained by ``optimizer``; on one device, of one dtype.
        hidden_size: d of the gradient scaling, whose divisor is sqrt(n / d); None turns it off.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factors: Sequence[StiefelFactor], hidden_size: float | None
    ) -> None:
        self._hidden_size = hidden_size
        by_shape: dict[torch.Size, list[StiefelFactor]] = defaultdict(list)
        for factor in factors:
            by_shape[factor.view.shape].append(factor)
        self._groups = list(by_shape.values())
        self._before: list[Tensor] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._convert_gradients),
            optimizer.register_step_post_hook(self._retract),
        ]

    @torch.no_grad()
    def _convert_gradients(self, *_: object) -> None:
        self._before = []
        for group in self._groups:
            Y = torch.stack([factor.view for factor in group])  # (B, n, r)
            gradient = torch.stack([_gradient_view(factor) for factor in group])  # (B, n, r)
            gradient = gradient - Y @ (gradient.mT @ Y)
            for factor, converted in zip(group, gradient, strict=True):
                _gradient_view(factor).copy_(converted)
            self._before.append(Y)

    @torch.no_grad()
    def _retract(self, *_: object) -> None:
        for group, Y in zip(self._groups, self._before, strict=True):
            delta = torch.stack([factor.view for factor in group]) - Y  # (B, n, r)
            if self._hidden_size is not None and Y.shape[-2] != self._hidden_size:
                delta.div_(math.sqrt(Y.shape[-2] / self._hidden_size))
            product = Y.mT @ delta  # (B, r, r)
            delta = delta - Y @ (0.5 * (product + product.mT))
            M = Y + delta
            P, _, Rt = torch.linalg.svd(M, full_matrices=False, driver=svd_driver(M))
            for factor, retracted in zip(group, P @ Rt, strict=True):
                factor.view.copy_(retracted)
        self._before = []

    def remove(self) -> None:
        """Take the geometry off the optimizer."""
        while self._handles:
            self._handles.pop().remove()


def _gradient_view(factor: StiefelFactor) -> Tensor:
    gradient = factor.parameter.grad
    if gradient is None:
        raise RuntimeError(f"{factor.name}: no gradient; call backward() before optimizer.step().")
    return gradient.mT if factor.transposed else gradient

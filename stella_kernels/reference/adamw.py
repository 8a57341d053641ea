"""The Riemannian AdamW step of one factor, in plain PyTorch: what the fused operator is tested against.

Factors Y, Euclidean gradients ∇ and moments m, v are (..., n, r), in float32 or float64 on any device; every function
returns new tensors.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import stiefel
from .autocast import outside_autocast


@outside_autocast
def adamw_move(
    Y: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
    divisor: float = 1.0,
    sign: float = 1.0,
    coupling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The move D that AdamW (Loshchilov and Hutter, arXiv 1711.05101) makes from Y, and the moments after it.

    ``g = sign (∇ − Y K)`` with ``K = ∇ᵀY``; ``m ← m + (1 − β₁)(g − m)``; ``v ← β₂ v + (1 − β₂) g²``;
    ``D = −lr / (1 − β₁ᵗ) · m / (sqrt(v) / sqrt(1 − β₂ᵗ) + eps) / divisor``.

    Args:
        step: t, this step counted: 1 for the first.
        divisor: of the gradient scaling, ``stiefel.gradient_scaling_divisor``.
        sign: 1, or −1 to maximize.
        coupling: K (..., r, r) where it is known; computed otherwise.

    Returns (D, m, v), each (..., n, r).
    """
    K = gradient.mT @ Y if coupling is None else coupling  # (..., r, r)
    g = sign * (gradient - Y @ K)
    m = exp_avg + (1 - beta1) * (g - exp_avg)
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    return -lr / (1 - beta1**step) / divisor * m / denominator, m, v


@outside_autocast
def riemannian_adamw_step(
    Y: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
    divisor: float = 1.0,
    sign: float = 1.0,
    coupling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step on the Stiefel manifold as published (StelLA, arXiv 2510.01938): returns (Y, m, v) after it.

    ``adamw_move``, projected to the tangent space at Y, with the polar retraction. Arguments as there.
    """
    D, m, v = adamw_move(
        Y,
        gradient,
        exp_avg,
        exp_avg_sq,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        step=step,
        divisor=divisor,
        sign=sign,
        coupling=coupling,
    )
    return stiefel.polar_retraction(Y, stiefel.tangent_projection(Y, D)), m, v

"""The quotient geometry St(m, r) × R^(r×r) × St(n, r) / (O(r) × O(r)) of the products U S Vᵀ, in plain PyTorch.

U S Vᵀ is unchanged by (U O, Oᵀ S P, V P) with O and P orthogonal: those points are one fibre, and a step ought to leave
it straight away, moving along the horizontal space only. Horizontal is meant in the metric of R3MC (Mishra and
Sepulchre, arXiv 1306.2672), which the StelLA paper takes for this ablation (arXiv 2510.01938,
appendix B), damped so that it stays a metric where S is singular::

    g(ξ, η) = tr(A ξ_Uᵀ η_U) + tr(ξ_Sᵀ η_S) + tr(B ξ_Vᵀ η_V),  A = S Sᵀ + δ I,  B = Sᵀ S + δ I,  δ = DAMPING

R3MC has δ = 0. The metric is constant on fibres (for any δ), so steps taken from two points of a fibre along
corresponding vectors reach one fibre. With the SVD ``S = P diag(σ) Rᵀ`` every r × r equation below falls apart into
entries, one for each pair of singular values, so none is iterated and none depends on which SVD was found.

A ``Triple`` is (U-like (..., m, r), S-like (..., r, r), V-like (..., n, r)), batched over the leading dimensions, all
of one dtype (float32 or float64) and device. S is full: a diagonal S leaves no O and P to divide by.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ..checks import check_choice
from . import stiefel
from .autocast import outside_autocast

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]

# S starts at the identity: there the metric is 1e-4 from R3MC's, and preconditioning enlarges no gradient over 50 times
DAMPING = 1e-4


def _skew(M: Tensor) -> Tensor:
    """Skew-symmetric part of (..., r, r)."""
    return (M - M.mT) / 2


@outside_autocast
def metric(S: Tensor) -> tuple[Tensor, Tensor]:
    """``A = S Sᵀ + δ I`` and ``B = Sᵀ S + δ I``, both (..., r, r): what weighs moves of U, and of V."""
    damping = DAMPING * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return S @ S.mT + damping, S.mT @ S + damping


@outside_autocast
def inner_product(S: Tensor, xi: Triple, eta: Triple) -> Tensor:
    """``g(ξ, η)`` at a point with this S, (...): R3MC's metric, damped (see above)."""
    parts = zip(metric(S), (xi[0], xi[2]), (eta[0], eta[2]), strict=True)
    total = (xi[1] * eta[1]).sum((-2, -1))
    for weight, x, y in parts:
        total = total + ((x @ weight) * y).sum((-2, -1))
    return total


@outside_autocast
def vertical(point: Triple, omega_U: Tensor, omega_V: Tensor) -> Triple:
    """``(U Ω, S Ω' − Ω S, V Ω')``: the velocity of moving along the fibre, for skew Ω, Ω' (..., r, r)."""
    U, S, V = point
    return U @ omega_U, S @ omega_V - omega_U @ S, V @ omega_V


@outside_autocast
def riemannian_gradient(point: Triple, gradient: Triple) -> Triple:
    """The Riemannian gradient in g, of a function with this Euclidean gradient (R3MC, equation 9).

    ``(∇_U A⁻¹, ∇_S, ∇_V B⁻¹)``, projected to the tangent space. Horizontal when the function depends on U S Vᵀ alone.
    """
    P, sigma, Rt = torch.linalg.svd(point[1])
    inverse = 1 / (sigma.square() + DAMPING)  # (..., r)
    A_inverse, B_inverse = (P * inverse.unsqueeze(-2)) @ P.mT, (Rt.mT * inverse.unsqueeze(-2)) @ Rt  # (..., r, r)
    return tangent_projection(point, (gradient[0] @ A_inverse, gradient[1], gradient[2] @ B_inverse))


@outside_autocast
def tangent_projection(point: Triple, delta: Triple) -> Triple:
    """The projection to the tangent space that is orthogonal in g: U Z A⁻¹ is taken away, and V Z' B⁻¹ (R3MC, eq. 5).

    Z is symmetric, such that Uᵀ(ξ − U Z A⁻¹) is skew: in A's eigenbasis ``(Z A⁻¹)ᵢⱼ = 2 aᵢ / (aᵢ + aⱼ) symm(Uᵀξ)ᵢⱼ``.
    """
    U, S, V = point
    P, sigma, Rt = torch.linalg.svd(S)
    a = sigma.square() + DAMPING  # (..., r), eigenvalues of A and of B
    weight = 2 * a.unsqueeze(-1) / (a.unsqueeze(-1) + a.unsqueeze(-2))  # (..., r, r)

    def project(Y: Tensor, move: Tensor, basis: Tensor) -> Tensor:
        normal = weight * (basis.mT @ stiefel.symm(Y.mT @ move) @ basis)  # (..., r, r)
        return move - Y @ (basis @ normal @ basis.mT)

    return project(U, delta[0], P), delta[1], project(V, delta[2], Rt.mT)


@outside_autocast
def horizontal_projection(point: Triple, tangent: Triple) -> Triple:
    """The part of a tangent vector that is orthogonal in g to the fibre through ``point``.

    The vertical vector taken away has Ω, Ω' that solve, with ``skew(M) = (M − Mᵀ)/2``, the coupled equations
    ``skew(ΩA) + skew(ΩSSᵀ) − SΩ'Sᵀ = skew(Uᵀξ_U A − ξ_S Sᵀ)`` and
    ``skew(Ω'B) + skew(Ω'SᵀS) − SᵀΩS = skew(Vᵀξ_V B + Sᵀξ_S)``. In the singular bases of S an entry of both is
    ``[d, −c; −c, d] (ω, ω') = (h, h')`` with ``c = σᵢσⱼ`` and ``d = σᵢ² + σⱼ² + δ >= 2c + δ``: never singular.
    """
    U, S, V = point
    P, sigma, Rt = torch.linalg.svd(S)
    R = Rt.mT
    a = sigma.square().unsqueeze(-1)  # (..., r, 1)
    damped = a.mT + DAMPING  # (..., 1, r): right factors A and B are diagonal in these bases
    core = P.mT @ tangent[1] @ R  # (..., r, r)
    h_U = _skew((P.mT @ (U.mT @ tangent[0]) @ P) * damped - core * sigma.unsqueeze(-2))
    h_V = _skew((R.mT @ (V.mT @ tangent[2]) @ R) * damped + sigma.unsqueeze(-1) * core)
    c, d = sigma.unsqueeze(-1) * sigma.unsqueeze(-2), a + damped  # (..., r, r), symmetric both
    determinant = (d - c) * (d + c)
    omega_U, omega_V = (d * h_U + c * h_V) / determinant, (c * h_U + d * h_V) / determinant
    along = vertical(point, P @ omega_U @ P.mT, R @ omega_V @ R.mT)
    return tangent[0] - along[0], tangent[1] - along[1], tangent[2] - along[2]


@outside_autocast
def horizontal_move(point: Triple, moved: Triple, divisor_U: float, divisor_V: float) -> Triple:
    """The horizontal vector at ``point`` of a move to ``moved``, those of U and V first divided by their divisors."""
    delta = tuple(new - old for new, old in zip(moved, point, strict=True))
    scaled = (delta[0] / divisor_U, delta[1], delta[2] / divisor_V)
    return horizontal_projection(point, tangent_projection(point, scaled))


@outside_autocast
def project_retract(
    point: Triple, moved: Triple, divisor_U: float, divisor_V: float, retraction: str = "polar"
) -> Triple:
    """The triple after a step that took ``point`` to ``moved``: scale, project to the horizontal space, retract.

    U and V are retracted as on the Stiefel manifold, and S moves along a straight line (R3MC, equation 7). 'polar',
    'exp_map' and 'cayley' take a fibre to a fibre; 'qr' does not (the Q of a QR is not that of rotated columns).
    Raises ``ValueError`` for a retraction not in ``stiefel.RETRACTIONS``.
    """
    check_choice("retraction", retraction, tuple(stiefel.RETRACTIONS))
    U, S, V = point
    xi = horizontal_move(point, moved, divisor_U, divisor_V)
    retract = stiefel.RETRACTIONS[retraction]
    return retract(U, xi[0]), S + xi[1], retract(V, xi[2])

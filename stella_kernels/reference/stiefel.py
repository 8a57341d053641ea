"""Geometry of the Stiefel manifold St(n, r) = {Y of shape (n, r) : YᵀY = I}, in plain PyTorch.

Every function takes (..., n, r) with n >= r, batched over the leading dimensions, in float32 or float64 on any
device (callers upcast bfloat16 and float16: the factorisations below have no kernel for them), and returns new
tensors. These are the definitions the native kernels are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_choice
from .autocast import outside_autocast


def symm(M: Tensor) -> Tensor:
    """Symmetric part ``(M + Mᵀ) / 2`` of square matrices (..., r, r)."""
    return (M + M.mT) / 2


@outside_autocast
def riemannian_gradient(Y: Tensor, gradient: Tensor) -> Tensor:
    """Riemannian gradient ``∇ − Y ∇ᵀ Y`` of a function with Euclidean gradient ∇ at Y; both (..., n, r).

    Canonical metric: Edelman, Arias and Smith 1998, equation 2.53.
    """
    return gradient - Y @ (gradient.mT @ Y)


@outside_autocast
def tangent_projection(Y: Tensor, delta: Tensor) -> Tensor:
    """Orthogonal projection ``Δ − Y symm(YᵀΔ)`` of Δ to the tangent space at Y; both (..., n, r).

    Edelman, Arias and Smith 1998, equation 2.4 (written there as Y skew(YᵀΔ) + (I − YYᵀ)Δ).
    """
    return delta - Y @ symm(Y.mT @ delta)


def gradient_scaling_divisor(n: int, hidden_size: float | None) -> float:
    """Divisor ``sqrt(n / d)`` of a factor's step, d the model's hidden size; 1 when ``hidden_size`` is None.

    StelLA (arXiv 2510.01938): balances the steps of U and V where their heights differ.
    Raises ``ValueError`` where ``hidden_size`` is not a positive finite number.
    """
    if hidden_size is None:
        return 1.0
    if not (math.isfinite(hidden_size) and hidden_size > 0):
        raise ValueError(
            f"hidden_size: found {hidden_size!r}, wanted a positive number (the width of the model's residual "
            "stream), or None to leave the steps as they are."
        )
    return math.sqrt(n / hidden_size)


@outside_autocast
def orthonormality_error(Q: Tensor) -> Tensor:
    """Frobenius norm ``‖QᵀQ − I‖`` of each matrix: (..., n, r) gives (...)."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.matrix_norm(Q.mT @ Q - identity)


def _zero_where(Q: Tensor, of: Tensor) -> Tensor:
    """Q (..., n, r), with the rows exactly zero that are zero in ``of``, where a factorisation of it leaves round-off.

    Adam would make a whole step of it; the padding of an adapted embedding is such a row.
    """
    return Q * (of != 0).any(-1, keepdim=True)


@outside_autocast
def polar_factor(M: Tensor) -> Tensor:
    """Orthogonal polar factor ``uf(M) = M (MᵀM)^(-1/2)``, as ``P Rᵀ`` from the thin SVD ``M = P Σ Rᵀ``.

    The matrix with orthonormal columns nearest to M (Higham 2008, Functions of Matrices, theorem 8.4). Where M is
    rank deficient uf(M) is not unique; this returns one such matrix, still with orthonormal columns.
    """
    P, sigma, Rt = torch.linalg.svd(M, full_matrices=False)  # (..., n, r), (..., r), (..., r, r)
    Q = P @ Rt
    negligible = sigma <= M.shape[-2] * torch.finfo(M.dtype).eps * sigma[..., :1]  # (..., r)
    deficient = negligible.any(-1, keepdim=True)  # (..., 1), also where r = 0
    # then columns of Q may need the rows that are zero in M
    return torch.where(deficient.unsqueeze(-1), Q, _zero_where(Q, M))


@outside_autocast
def polar_retraction(Y: Tensor, delta: Tensor) -> Tensor:
    """Polar retraction ``uf(Y + Δ)``: second order (Absil, Mahony and Sepulchre 2008, example 4.1.3)."""
    return polar_factor(Y + delta)


@outside_autocast
def qr_retraction(Y: Tensor, delta: Tensor) -> Tensor:
    """QR retraction ``qf(Y + Δ)``, the Q of the QR with a positive diagonal (Absil et al. 2008, example 4.1.3)."""
    moved = Y + delta
    Q, R = torch.linalg.qr(moved)
    Q = _zero_where(Q, moved)
    diagonal = R.diagonal(dim1=-2, dim2=-1)  # (..., r)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype)
    return Q * sign.unsqueeze(-2)


@outside_autocast
def skew_exponential(X: Tensor) -> Tensor:
    """Matrix exponential of real skew-symmetric matrices (..., k, k), from the Hermitian eigenproblem of ``iX``."""
    # Not torch.linalg.matrix_exp: in float64 it is only good to 1e-11 for 1-norms of 0.02 to 0.05 (torch 2.13).
    eigenvalues, V = torch.linalg.eigh(1j * X)  # iX = V diag(λ) Vᴴ, so X = V diag(−iλ) Vᴴ
    return ((V * torch.exp(-1j * eigenvalues).unsqueeze(-2)) @ V.mH).real


@outside_autocast
def exponential_map(Y: Tensor, delta: Tensor) -> Tensor:
    """End point ``Y M + Q N`` of the canonical geodesic that leaves Y with the tangent vector Δ.

    With ``A = YᵀΔ`` (skew) and the QR ``Q R = (I − YYᵀ)Δ``: ``[M; N] = exp([[A, −Rᵀ], [R, 0]]) [I; 0]``
    (Edelman, Arias and Smith 1998, corollary 2.2). Columns of Y that are not quite orthonormal stay as far off.
    """
    n, r = Y.shape[-2:]
    YtD = Y.mT @ delta  # (..., r, r)
    A = (YtD - YtD.mT) / 2
    normal = delta - Y @ YtD  # (..., n, r)
    # Y goes in front, so that Q stays orthogonal to Y where the normal part is rank deficient (always, if n < 2r).
    k = min(r, n - r)
    both = torch.cat([Y, normal], dim=-1)  # (..., n, 2r)
    Q = _zero_where(torch.linalg.qr(both).Q[..., r : r + k], both)  # (..., n, k)
    R = Q.mT @ normal  # (..., k, r)
    generator = Y.new_zeros(*torch.broadcast_shapes(A.shape[:-2], R.shape[:-2]), r + k, r + k)
    generator[..., :r, :r] = A
    generator[..., :r, r:] = -R.mT
    generator[..., r:, :r] = R
    MN = skew_exponential(generator)[..., :r]  # (..., r + k, r)
    return Y @ MN[..., :r, :] + Q @ MN[..., r:, :]


@outside_autocast
def cayley_retraction(Y: Tensor, delta: Tensor) -> Tensor:
    """Cayley retraction ``(I − W/2)⁻¹ (I + W/2) Y`` with ``W = P Δ Yᵀ − Y Δᵀ P`` and ``P = I − Y Yᵀ / 2``.

    W is n × n of rank 2r: ``W = L Kᵀ`` with ``L = [PΔ, Y]`` and ``K = [Y, −PΔ]``, so by Sherman, Morrison and Woodbury
    the result is ``Y + L (I − KᵀL/2)⁻¹ KᵀY`` (Wen and Yin 2013, lemma 4). Columns of Y that are not quite
    orthonormal stay as far off.
    """
    PD = delta - Y @ (Y.mT @ delta) / 2  # (..., n, r)
    L = torch.cat([PD, Y], dim=-1)  # (..., n, 2r)
    K = torch.cat([Y, -PD], dim=-1)  # (..., n, 2r)
    identity = torch.eye(L.shape[-1], dtype=Y.dtype, device=Y.device)
    return Y + L @ torch.linalg.solve(identity - K.mT @ L / 2, K.mT @ Y)


RETRACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "polar": polar_retraction,
    "exp_map": exponential_map,
    "qr": qr_retraction,
    "cayley": cayley_retraction,
}


@outside_autocast
def project_retract(Y: Tensor, moved: Tensor, divisor: float, retraction: str = "polar") -> Tensor:
    """The factor after a step that took Y to ``moved``: scale, project to the tangent space at Y, retract.

    ``Δ = (moved − Y) / divisor``, ``Δ ← Δ − Y symm(YᵀΔ)``, ``Y ← retraction(Y, Δ)`` (StelLA, arXiv
    2510.01938). Y and ``moved`` are (..., n, r). Raises ``ValueError`` for a retraction not in ``RETRACTIONS``.
    """
    check_choice("retraction", retraction, tuple(RETRACTIONS))
    return RETRACTIONS[retraction](Y, tangent_projection(Y, (moved - Y) / divisor))

"""Polar factors and retractions out of ordinary torch calls: what the native kernels have to beat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.stiefel.published import svd_driver

ROUND_OFF = 1e-7  # float32
MAX_STEPS = 20


def svd(M: Tensor) -> Tensor:
    """Polar factor ``P Rᵀ`` from the thin SVD ``M = P Σ Rᵀ``; M is (B, n, r), as in every function here."""
    P, _, Rt = torch.linalg.svd(M, full_matrices=False, driver=svd_driver(M))
    return P @ Rt


def qr(M: Tensor) -> Tensor:
    """Q of the thin QR: a different retraction (not the polar factor), for scale."""
    return torch.linalg.qr(M).Q


def gram_eigh(M: Tensor) -> Tensor:
    """Polar factor ``M E Λ^(-1/2) Eᵀ`` from the eigenvalues Λ and eigenvectors E of the Gram ``MᵀM``."""
    values, vectors = torch.linalg.eigh(M.mT @ M)  # (B, r), (B, r, r)
    return M @ ((vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT)


def inverse_root(gram: Tensor) -> Tensor:
    """``G^(-1/2)`` (B, r, r) by coupled Newton–Schulz (Higham 2008, equation 6.35).

    Scaled by a norm bound on the largest eigenvalue. The number of steps follows the error recursion
    e ← (3 e² + e³) / 4 from the worst ‖I − G/c‖ of the batch down to round-off.
    """
    bound = torch.linalg.matrix_norm(gram, ord=float("inf"))  # (B,)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    X = gram / bound[:, None, None]
    error = min(float(torch.linalg.matrix_norm(identity - X).max()), 0.99)
    root = identity.expand_as(X)
    for _ in range(MAX_STEPS):
        if error < ROUND_OFF:
            break
        T = torch.baddbmm(identity, root, X, beta=1.5, alpha=-0.5)
        X, root = X @ T, T @ root
        error = (3 * error**2 + error**3) / 4
    return root * bound.rsqrt()[:, None, None]


def gram_newton_schulz(M: Tensor) -> Tensor:
    """Polar factor ``M (MᵀM)^(-1/2)``, the root by Newton–Schulz on the Gram."""
    return M @ inverse_root(M.mT @ M)


POLAR: dict[str, Callable[[Tensor], Tensor]] = {
    "svd": svd,
    "gram_eigh": gram_eigh,
    "gram_newton_schulz": gram_newton_schulz,
}


def project_then(polar: Callable[[Tensor], Tensor], Y: Tensor, moved: Tensor, divisor: float) -> Tensor:
    """Steps 3 to 5 of the published step, (B, n, r) each, with one of the polar factors above."""
    delta = (moved - Y) / divisor
    product = Y.mT @ delta  # (B, r, r)
    return polar(Y + torch.baddbmm(delta, Y, 0.5 * (product + product.mT), alpha=-1.0))


def one_reduction(Y: Tensor, moved: Tensor, divisor: float) -> Tensor:
    """The same from the three Gram blocks of Y and Δ alone, as the native kernel does: no pass over the projected M."""
    delta = (moved - Y) / divisor
    C, A, D = Y.mT @ Y, Y.mT @ delta, delta.mT @ delta  # (B, r, r) each
    B = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - 0.5 * (A + A.mT)
    BA = B.mT @ A
    R = inverse_root(B.mT @ C @ B + BA + BA.mT + D)
    return torch.baddbmm(delta @ R, Y, B @ R)


RETRACT: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    **{name: partial(project_then, polar) for name, polar in POLAR.items()},
    "one_reduction": one_reduction,
}

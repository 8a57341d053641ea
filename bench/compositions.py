"""Ways to a matrix with orthonormal columns out of ordinary torch calls: what the native kernel has to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUND_OFF = 1e-7  # float32
MAX_STEPS = 20


def svd(M: Tensor) -> Tensor:
    """Polar factor ``P Rᵀ`` from the thin SVD ``M = P Σ Rᵀ``; M is (B, n, r), as in every function here."""
    P, _, Rt = torch.linalg.svd(M, full_matrices=False)
    return P @ Rt


def qr(M: Tensor) -> Tensor:
    """Q of the thin QR: a different retraction (not the polar factor), for scale."""
    return torch.linalg.qr(M).Q


def gram_eigh(M: Tensor) -> Tensor:
    """Polar factor ``M E Λ^(-1/2) Eᵀ`` from the eigenvalues Λ and eigenvectors E of the Gram ``MᵀM``."""
    values, vectors = torch.linalg.eigh(M.mT @ M)  # (B, r), (B, r, r)
    return M @ ((vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT)


def gram_newton_schulz(M: Tensor) -> Tensor:
    """Polar factor ``M (MᵀM)^(-1/2)``, the root by coupled Newton–Schulz on the Gram (Higham 2008, equation 6.35).

    Scaled by a norm bound on the largest eigenvalue. The number of steps follows the error recursion
    e ← (3 e² + e³) / 4 from the worst ‖I − G/c‖ of the batch down to round-off.
    """
    gram = M.mT @ M  # (B, r, r)
    bound = torch.linalg.matrix_norm(gram, ord=float("inf"))  # (B,)
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    X = gram / bound[:, None, None]
    error = min(float(torch.linalg.matrix_norm(identity - X).max()), 0.99)
    root = identity.expand_as(X)
    for _ in range(MAX_STEPS):
        if error < ROUND_OFF:
            break
        T = torch.baddbmm(identity, root, X, beta=1.5, alpha=-0.5)
        X, root = X @ T, T @ root
        error = (3 * error**2 + error**3) / 4
    return M @ (root * bound.rsqrt()[:, None, None])


POLAR: dict[str, Callable[[Tensor], Tensor]] = {
    "svd": svd,
    "gram_eigh": gram_eigh,
    "gram_newton_schulz": gram_newton_schulz,
}

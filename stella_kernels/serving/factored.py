"""The mathematics between StelLA and LoRA, in float64: products of factors, their sums, their SVD.

A StelLA adapter ``s · U S Vᵀ`` is the LoRA adapter ``B A`` with ``A = Vᵀ`` and ``B = s U S``, exactly. What is common
to everything here is a product ``L C R`` of a tall, a small and a wide matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """A low-rank matrix (m, n), as ``left @ core @ right``: (m, k), (k, k), (k, n), float64, on one device."""

    left: Tensor
    core: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """k: an upper bound of the rank."""
        return int(self.core.shape[0])

    def dense(self) -> Tensor:
        """The product, (m, n)."""
        return self.left @ self.core @ self.right


def from_stella(U: Tensor, S: Tensor, Vt: Tensor, scale: float, start: tuple[Tensor, Tensor] | None = None) -> Factored:
    """``scale · (U S Vᵀ − U0 V0ᵀ)``, of rank r, or 2r with a start.

    Args:
        U, S, Vt: (m, r), (r, r) or (r,), (r, n), of any floating-point dtype.
        scale: the adapter's.
        start: U0 (m, r) and V0ᵀ (r, n), what an adapter that starts as 'pseudo_zero' subtracts.
    """
    U, S, Vt = U.double(), S.double(), Vt.double()
    core = scale * (torch.diag(S) if S.dim() == 1 else S)
    if start is None:
        return Factored(U, core, Vt)
    U0, V0t = start[0].double(), start[1].double()
    taken = -scale * torch.eye(U0.shape[1], dtype=torch.float64, device=U.device)
    return Factored(torch.cat([U, U0], 1), torch.block_diag(core, taken), torch.cat([Vt, V0t], 0))


def from_lora(A: Tensor, B: Tensor) -> Factored:
    """``B A`` of A (r, n) and B (m, r)."""
    return Factored(B.double(), torch.eye(A.shape[0], dtype=torch.float64, device=A.device), A.double())


def weighted_sum(parts: Sequence[Factored], weights: Sequence[float]) -> Factored:
    """``Σ w_i P_i`` of matrices of one shape: side by side, of the sum of their ranks."""
    return Factored(
        torch.cat([part.left for part in parts], 1),
        torch.block_diag(*(weight * part.core for part, weight in zip(parts, weights, strict=True))),
        torch.cat([part.right for part in parts], 0),
    )


def orthonormalised(product: Factored) -> Factored:
    """The same matrix with orthonormal ``left`` (m, k) and ``right`` (k, n), by two QRs; k is at most min(m, n).

    The core is full. Exact also where the columns are dependent: a Householder Q is orthonormal whatever it is of.
    """
    Q_left, R_left = _qr(product.left)  # (m, p), (p, k), p = min(m, k)
    Q_right, R_right = _qr(product.right.mT)  # (n, q), (q, k)
    core = R_left @ product.core @ R_right.mT  # (p, q)
    if core.shape[0] > core.shape[1]:
        Q, core = torch.linalg.qr(core)
        Q_left = Q_left @ Q
    elif core.shape[0] < core.shape[1]:
        Q, R = torch.linalg.qr(core.mT)
        Q_right, core = Q_right @ Q, R.mT
    return Factored(Q_left, core, Q_right.mT)


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The QR of (n, k), whose Q has the rows exactly zero that ``matrix`` has, as of the padding of an embedding.

    A QR leaves round-off there, of which Adam would make whole steps.
    """
    rows = (matrix != 0).any(1)  # (n,)
    if int(rows.sum()) < min(matrix.shape):
        Q, R = torch.linalg.qr(matrix)  # too few rows for orthonormal columns
        return Q, R
    Q = torch.zeros(matrix.shape[0], min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    Q[rows], R = torch.linalg.qr(matrix[rows])
    return Q, R


def singular(product: Factored) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of the matrix at the cost of its core: left (m, k), values (k,) descending, right (k, n)."""
    product = orthonormalised(product)
    P, values, Qt = torch.linalg.svd(product.core)
    return product.left @ P, values, Qt @ product.right


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps the share ``energy`` of the squared singular values, at least 1, as PEFT counts."""
    kept = torch.cumsum(values.square(), 0)
    return min(int(torch.searchsorted(kept, energy * kept[-1])) + 1, len(values))

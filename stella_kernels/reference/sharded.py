"""The Stiefel step on some rows of a factor, in plain PyTorch: what couples rows is an r × r sum (docs/design.md 3.6).

Factors Y, gradients ∇ and steps Δ are (n_i, r), the rows of one process, float32 or float64 on any device; every
function returns new tensors. Summed over the processes, the blocks are those of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .autocast import outside_autocast
from .stiefel import symm


def packed(blocks: tuple[Tensor, Tensor], *more: Tensor) -> Tensor:
    """A square block (r, r), the upper triangle of a symmetric one, and what follows: flat."""
    full, symmetric = blocks
    r = full.shape[0]
    i, j = torch.triu_indices(r, r, device=full.device)
    return torch.cat([full.reshape(-1), symmetric[i, j], *more])


def unpacked(flat: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Of ``packed`` the two blocks, (r, r) each."""
    full, upper = flat[: r * r].reshape(r, r), flat[r * r : r * r + r * (r + 1) // 2]
    i, j = torch.triu_indices(r, r, device=flat.device)
    symmetric = flat.new_zeros(r, r)
    symmetric[i, j] = upper
    symmetric[j, i] = upper
    return full, symmetric


@outside_autocast
def gradient_blocks(Y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """K = ∇ᵀY and C = YᵀY of these rows, (r, r) each."""
    return gradient.mT @ Y, Y.mT @ Y


@outside_autocast
def step_blocks(Y: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """A = YᵀΔ and D = ΔᵀΔ of these rows, (r, r) each."""
    return Y.mT @ delta, delta.mT @ delta


@dataclass(frozen=True)
class Solution:
    """``uf(Y B + Δ) = Y + Y left + Δ right`` with ``B = I − symm(A)``, of all rows; None where that is rank deficient.

    Attributes:
        left, right: (r, r) float64.
        condition: of the Gram matrix ``G = (Y B + Δ)ᵀ (Y B + Δ)``, infinite where it is not positive.
        growth: how much larger than G the terms are of which it is the sum: their round-off is left in it.
    """

    left: Tensor
    right: Tensor
    condition: float
    growth: float


@outside_autocast
def solve(C: Tensor, A: Tensor, D: Tensor) -> Solution:
    """The polar retraction by the blocks of all rows: ``G = B C B + B A + Aᵀ B + D``, ``right = G^(-1/2)``."""
    C, A, D = C.double(), A.double(), D.double()
    identity = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    S = symm(A)
    B = identity - S
    G = symm(B @ C @ B + B @ A + A.mT @ B + D)
    if not bool(G.isfinite().all()):
        return Solution(identity, identity, torch.inf, torch.inf)
    values, V = torch.linalg.eigh(G)
    least, most = float(values[0]), float(values[-1])
    R = V @ torch.diag(values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()) @ V.mT
    terms = max(1.0, float(D.diagonal().max()))
    return Solution(
        (R - identity) - S @ R, R, most / least if least > 0 else torch.inf, terms / most if most > 0 else torch.inf
    )

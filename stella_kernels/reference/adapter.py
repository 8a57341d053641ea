"""The adapter y = W x + b + s U S Vᵀ x, forward and backward, as equations: any float dtype, any device.

Source: arXiv 2510.01938, with the gradients written out. T rows, d is dropout; shapes: x (T, n), U (m, r), Vt = Vᵀ
(r, n), S (r, r), or (r,) when S is diagonal. The base layer is not here: these are the adapter's terms alone.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import philox
from .autocast import outside_autocast


class AdapterGradients(NamedTuple):
    """The adapter's gradients, each of the shape of what it belongs to."""

    x: Tensor
    U: Tensor
    S: Tensor
    Vt: Tensor


@outside_autocast
def times_core(rows: Tensor, S: Tensor) -> Tensor:
    """``rows @ S`` for (T, r) rows, where S is (r, r) or the (r,) diagonal."""
    return rows * S if S.dim() == 1 else rows @ S


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """d(x): x itself when p is 0, else its dropout under the Philox mask of ``seed`` (an int64 scalar)."""
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError(f"seed: found None with dropout {p}, wanted an int64 scalar tensor.")
    return philox.dropout(x, p, seed)


@outside_autocast
def adapter_forward(
    x: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A = d(x) V, P = A Sᵀ; returns (s P Uᵀ, A), (T, m) and (T, r)."""
    A = dropped(x, p, seed) @ Vt.mT  # (T, r)
    P = times_core(A, S.mT if S.dim() == 2 else S)  # (T, r)
    return scale * (P @ U.mT), A


@outside_autocast
def adapter_backward(
    grad_y: Tensor,
    x: Tensor,
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> AdapterGradients:
    """With Y' = grad_y (T, m): Q = s Y' U, ∂U = s Y'ᵀ P, ∂S = Qᵀ A, K = Q S, ∂V = d(x)ᵀ K, ∂x = dᵀ(K Vᵀ).

    The mask and its scale make d a diagonal linear map, so dᵀ is d with the same seed.
    """
    kept = dropped(x, p, seed)  # (T, n)
    A = kept @ Vt.mT  # (T, r)
    P = times_core(A, S.mT if S.dim() == 2 else S)  # (T, r)
    Q = scale * (grad_y @ U)  # (T, r)
    K = times_core(Q, S)  # (T, r)
    grad_S = (Q * A).sum(0) if S.dim() == 1 else Q.mT @ A
    return AdapterGradients(x=dropped(K @ Vt, p, seed), U=scale * (grad_y.mT @ P), S=grad_S, Vt=K.mT @ kept)

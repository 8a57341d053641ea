"""The derivative of the polar factor Q of M = Q H, in both directions: one linear map, which is its own adjoint.

From M = Q H: dM = dQ H + Q dH with Ω = QᵀdQ skew and dH symmetric, so that the skew part of QᵀdM gives
``L(Ω) = QᵀdM − dMᵀQ``, L(Ω) = HΩ + ΩH, and the rest ``dQ = Q Ω + (dM − Q QᵀdM) H⁻¹``. In H's eigenbasis L divides entry
(i, j) by hᵢ + hⱼ. Put Ḡ for dM and the same map gives the gradient: L is self-adjoint and maps skew to skew. Source:
Higham, "Functions of Matrices" (2008), chapter 8 (the polar decomposition, its derivative and conditioning).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import registration as _registration  # noqa: F401  (defines the operators)
from .differentiable_once import differentiable_once, refusing

_ELEMENTS = 1 << 20  # of M that are float64 at one time, or a part of it
_MOST_PIECES = 32


def derivative(M: Tensor, Q: Tensor | None, direction: Tensor) -> Tensor:
    """``Q Ω + (D − Q K) H⁻¹`` with K = QᵀD and L(Ω) = K − Kᵀ, for D = ``direction``; all (..., n, r), in M's dtype.

    Everything is summed in float64, whatever the number of rows. Below float64, H is taken from the eigenvalues h² of
    MᵀM, whose error of eps κ² (κ the condition number) float64 has room for, and Q is M H⁻¹: its rounding counts for
    nothing. In float64 it has not, and H = symm(QᵀM) for the Q (given in float64 alone) that the kernels found.

    NaN throughout for a matrix without a derivative, one that is singular to working precision: an error of eps σ_max
    in M turns Q in the direction of h by eps σ_max / h, so that where h <= eps σ_max, eps of the arithmetic that made
    Q, no digit of Q is right there. What was summed adds its own: rounding errors of n terms are a random walk, sqrt(n)
    eps (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019), and those of the
    eigenvalues some r eps.
    """
    n, r = M.shape[-2:]
    if M.numel() == 0:
        return direction.clone()
    root = torch.exp2(-torch.floor(torch.log2(_largest(M)) / 2))  # (..., 1, 1): M is scaled by its square
    given = (M, direction) if Q is None else (M, direction, Q)
    products, couplings = [], []  # (..., r, r) each
    for M_rows, D_rows, *rest in _in_pieces(*given):
        scaled = M_rows * root * root
        left = rest[0] if rest else scaled
        products.append(left.mT @ scaled)
        couplings.append(left.mT @ D_rows)
    product, coupling = (functools.reduce(torch.add, terms) for terms in (products, couplings))
    h, E = torch.linalg.eigh((product + product.mT) / 2)  # (..., r), (..., r, r)
    eps = torch.finfo(torch.float64).eps
    floor = (math.sqrt(n) + 4 * r) * eps
    if Q is None:
        floor += torch.finfo(torch.float32).eps ** 2
    singular = (h[..., :1] <= floor * h[..., -1:]).unsqueeze(-1)  # (..., 1, 1)
    h = h if Q is not None else h.clamp(min=0.0).sqrt()
    inverse = (E / h.unsqueeze(-2)) @ E.mT  # H⁻¹
    K = coupling if Q is not None else inverse @ coupling  # QᵀD
    omega = E @ ((E.mT @ (K - K.mT) @ E) / (h.unsqueeze(-1) + h.unsqueeze(-2))) @ E.mT
    along = omega - K @ inverse  # what Q is multiplied by
    along = along if Q is not None else inverse @ along
    inverse, along = (torch.where(singular, torch.nan, t) for t in (inverse, along))
    pieces = []
    for M_rows, D_rows, *rest in _in_pieces(*given):
        left = rest[0] if rest else M_rows * root * root
        pieces.append(((D_rows @ inverse + left @ along) * root * root).to(M.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)


def _largest(M: Tensor) -> Tensor:
    """The largest magnitude of each matrix, (..., 1, 1) in float64; 1 for a matrix of zeros."""
    dims = (-2, -1)
    largest = torch.maximum(M.amax(dims, keepdim=True), -M.amin(dims, keepdim=True)).double()
    return torch.where(largest > 0, largest, 1.0)


def _in_pieces(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same rows of each of some (..., n, r) tensors, in float64, piece by piece."""
    first = tensors[0]
    n = rows = first.shape[-2]
    if isinstance(n, int):  # not while a graph of any size is traced
        pieces = min(_MOST_PIECES, -(-first.numel() // _ELEMENTS))
        rows = -(-n // pieces)
    for begin in range(0, n, rows):
        yield [t.narrow(-2, begin, min(rows, n - begin)).double() for t in tensors]


def _kept(M: Tensor, Q: Tensor) -> tuple[Tensor, Tensor | None]:
    return M, Q if Q.dtype == torch.float64 else None


class PolarFunction(torch.autograd.Function):
    """The operator for eager execution, with what torch.func's transforms and forward mode ask for."""

    @staticmethod
    def forward(M: Tensor, method: str) -> tuple[Tensor, Tensor]:
        return torch.ops.stella_kernels.polar(M, method)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor]) -> None:
        Q, info = output
        ctx.mark_non_differentiable(info)
        ctx.save_for_backward(*_kept(inputs[0], Q))
        ctx.save_for_forward(*_kept(inputs[0], Q))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_Q: Tensor, _grad_info: Tensor | None) -> tuple[Tensor, None]:
        return derivative(saved[0], saved[1], grad_Q), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _method: None) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            result = derivative(saved[0], saved[1], tangent)
        return refusing(result, tangent, *saved), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], M: Tensor, method: str) -> tuple[Any, tuple[int, int]]:
        """One more leading dimension, which the operator takes as it is."""
        assert in_dims[0] is not None
        Q, rows = PolarFunction.apply(M.movedim(in_dims[0], 0), method)
        return (Q, rows.reshape(info.batch_size, -1, rows.shape[-1])), (0, 0)


# Of the operator itself, which is what a compiled graph holds.
torch.library.register_autograd(
    "stella_kernels::polar", PolarFunction.backward, setup_context=PolarFunction.setup_context
)

"""The quotient geometry inside ``attach``: U, S and V of one product U S Vᵀ, taken through a step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import NonFiniteError
from ..nn import StiefelFactor
from ..operators.status import DRIFT, INFO_COLUMNS, STATUS_NON_FINITE, STATUS_OK
from ..reference import quotient, stiefel
from ..reference.quotient import Triple
from . import targets


@dataclass(frozen=True, eq=False)
class Product:
    """The three parameters of one U S Vᵀ: the indices of U and of V among the factors, and S (r, r)."""

    left: int
    right: int
    core: nn.Parameter
    core_name: str


def find_products(factors: Sequence[StiefelFactor]) -> list[Product]:
    """The factors paired by the S they share.

    Raises ``ValueError`` where a factor has no S, no partner, a diagonal or frozen S, or another dtype or device.
    """
    pairs: dict[int, dict[str, int]] = {}
    for index, factor in enumerate(factors):
        if factor.core is None or factor.side not in ("left", "right"):
            raise ValueError(
                f"{factor.name}: found a factor without its S, wanted one of a product U S Vᵀ, of which "
                "geometry='quotient' moves the three together; pass a model with StelLA adapters, or StiefelFactor(…, "
                "core=S, side='left' or 'right'), or use geometry='stiefel'."
            )
        pairs.setdefault(id(factor.core), {})[factor.side] = index
    if sum(map(len, pairs.values())) != len(factors):
        raise ValueError("target: two factors have the same core and side, wanted an S of its own for each product.")
    return [_product(factors, pair) for pair in pairs.values()]


def _product(factors: Sequence[StiefelFactor], pair: dict[str, int]) -> Product:
    names = " and ".join(factors[i].name for i in pair.values())
    if len(pair) == 1:
        raise ValueError(
            f"{names}: found no trained partner, wanted both U and V of the product: geometry='quotient' moves them "
            "and S together; train both, or use geometry='stiefel'."
        )
    left, right = factors[pair["left"]], factors[pair["right"]]
    core = left.core
    assert core is not None
    if core.dim() != 2:
        raise ValueError(
            f"{names}: found a diagonal S, wanted a full one: (U O, Oᵀ S P, V P) would not leave it diagonal, so there "
            "is no quotient to take. Build the adapter with a full S, or use geometry='stiefel'."
        )
    if not core.requires_grad:
        raise ValueError(f"{names}: found an S that is not trained, wanted one that geometry='quotient' may move.")
    kinds = {(p.dtype, p.device) for p in (left.parameter, core, right.parameter)}
    if len(kinds) > 1:
        raise ValueError(f"{names}: found U, S, V of {sorted(map(str, kinds))}, wanted one dtype and one device.")
    return Product(pair["left"], pair["right"], core, f"the S of {names}")


class QuotientStep:
    """What a step does to each product before and after the optimizer; see ``reference/quotient.py`` for the formulas.

    Before: gradients become Riemannian in R3MC's metric. After: the optimizer's move is projected to the horizontal
    space, U and V are retracted, S moves in a straight line. Plain PyTorch on any device, but for the polar factor.
    """

    def __init__(self, products: Sequence[Product], retraction: str, method: str) -> None:
        self.products = tuple(products)
        self._retraction = retraction
        self._method = method
        self._cores: list[tuple[Product, Tensor]] = []  # of the step under way: the products that move, S before

    def make_riemannian(self, gradients: dict[int, Tensor], views: Sequence[Tensor]) -> None:
        """Rewrite the gradients (n, r) by factor index, in place, and remember every S; nothing is written on an error.

        Raises ``RuntimeError`` if only some of U, S, V have a gradient, ``NonFiniteError`` for a NaN in that of S.
        """
        moving = [p for p in self.products if {p.left, p.right} & gradients.keys() or p.core.grad is not None]
        for product in moving:
            if not {product.left, product.right} <= gradients.keys() or product.core.grad is None:
                raise RuntimeError(
                    f"{product.core_name}: only some of U, S and V have a gradient, wanted all three or none: "
                    "geometry='quotient' moves them together. Train them all, or use geometry='stiefel'."
                )
        bad = [p.core_name for p in moving if p.core.grad is not None and not bool(p.core.grad.isfinite().all())]
        if bad:
            raise NonFiniteError(
                f"the gradient of {', '.join(bad)} holds NaN or an infinity, found before the optimizer moved "
                "anything. Zero the gradients and look at the loss of this batch.",
                bad,
            )
        written: list[tuple[Tensor, Tensor]] = []
        for p in moving:
            assert p.core.grad is not None
            point = _wide(views[p.left], p.core.detach(), views[p.right])
            euclidean = _wide(gradients[p.left], p.core.grad, gradients[p.right])
            G_U, _, G_V = quotient.riemannian_gradient(point, euclidean)  # that of S is the Euclidean one
            written += [(gradients[p.left], G_U), (gradients[p.right], G_V)]
        for gradient, value in written:
            gradient.copy_(value)
        self._cores = [(p, p.core.detach().clone()) for p in moving]

    def retract(self, before: dict[int, Tensor], views: Sequence[Tensor], divisors: Sequence[float]) -> Tensor:
        """Make the optimizer's moves horizontal and retract them, in place; a row of info for each of ``before``.

        Raises ``NonFiniteError`` for a product that the optimizer moved to NaN or an infinity; the caller restores.
        """
        rows: dict[int, list[float]] = {}
        for p, core in self._cores:
            point = _wide(before[p.left], core, before[p.right])
            moved = _wide(views[p.left], p.core.detach(), views[p.right])
            if not all(bool(t.isfinite().all()) for t in moved):
                raise NonFiniteError(
                    f"optimizer.step() moved {p.core_name}, or one of the two, to NaN or an infinity. All factors and "
                    "their S were put back to their values before this step; the other parameters and the optimizer's "
                    "state have taken it, so go on from a checkpoint, with a lower learning rate.",
                    [p.core_name],
                )
            xi = quotient.horizontal_move(point, moved, divisors[p.left], divisors[p.right])
            for index, Y, move in ((p.left, point[0], xi[0]), (p.right, point[2], xi[2])):
                Q, rows[index] = self._retracted(Y, move)
                views[index].copy_(Q)
            p.core.detach().copy_(point[1] + xi[1])
        return torch.tensor([rows[i] for i in before], dtype=torch.float64, device="cpu").reshape(-1, INFO_COLUMNS)

    def restore(self) -> None:
        """Give every S of the step under way its value before it."""
        for product, core in self._cores:
            product.core.detach().copy_(core)

    def _retracted(self, Y: Tensor, move: Tensor) -> tuple[Tensor, list[float]]:
        drift = float(stiefel.orthonormality_error(Y))
        if self._retraction == "polar":
            Q, info = torch.ops.stella_kernels.polar(Y + move, self._method)
            return Q, [*info[0, :DRIFT].tolist(), drift]
        Q = stiefel.RETRACTIONS[self._retraction](Y, move)  # (n, r)
        residual = float(stiefel.orthonormality_error(Q))
        status = STATUS_OK if residual < float("inf") else STATUS_NON_FINITE
        return Q, [status, residual, 0.0, float("nan"), drift]


def _wide(U: Tensor, S: Tensor, V: Tensor) -> Triple:
    """The three in a dtype that has factorisations: bfloat16 and float16 become float32."""
    if U.dtype in targets.HALF_DTYPES:
        return U.float(), S.float(), V.float()
    return U, S, V

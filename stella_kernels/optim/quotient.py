"""The quotient geometry inside ``attach``: U, S and V of one product U S Vᵀ, taken through a step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import NonFiniteError
from ..nn import StiefelFactor
from ..operators.status import INFO_COLUMNS
from ..reference import quotient
from ..reference.quotient import Triple
from . import targets
from .stiefel_step import retracted


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
        self._ready: tuple[list[Product], list[tuple[Tensor, Tensor]]] = ([], [])  # products, gradients and what to be

    def prepare(self, gradients: dict[int, Tensor], views: Sequence[Tensor]) -> None:
        """Compute the Riemannian gradients (n, r) by factor index; nothing is written yet.

        Raises ``RuntimeError`` if only some of U, S, V have a gradient, ``NonFiniteError`` for a NaN in that of S and
        where a Riemannian gradient overflows.
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
        large: list[str] = []
        for p in moving:
            assert p.core.grad is not None
            point = _wide(views[p.left], p.core.detach(), views[p.right])
            euclidean = _wide(gradients[p.left], p.core.grad, gradients[p.right])
            G_U, _, G_V = quotient.riemannian_gradient(point, euclidean)  # that of S is the Euclidean one
            pairs = [(g, G.to(g.dtype)) for g, G in ((gradients[p.left], G_U), (gradients[p.right], G_V))]
            if not all(bool(G.isfinite().all()) for _, G in pairs):
                large.append(p.core_name)
            written += pairs
        if large:
            raise NonFiniteError(
                f"the gradients of U and V beside {', '.join(large)} are finite and so large that the Riemannian "
                "gradient overflows, or that S is singular to round-off; nothing was changed. Zero the gradients and "
                "look at the loss of this batch, or clip them first.",
                large,
            )
        self._ready = (moving, written)

    def make_riemannian(self) -> None:
        """Rewrite the gradients in place, as prepared, and remember every S."""
        (moving, written), self._ready = self._ready, ([], [])
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
            point = (point[0].to(moved[0]), point[1].to(moved[0]), point[2].to(moved[0]))  # the step may change dtypes
            xi = quotient.horizontal_move(point, moved, divisors[p.left], divisors[p.right])
            for index, Y, move in ((p.left, point[0], xi[0]), (p.right, point[2], xi[2])):
                Q, rows[index] = retracted(Y, move, self._retraction, self._method, views[index].dtype)
                views[index].copy_(Q)
            p.core.detach().copy_(point[1] + xi[1])
        return torch.tensor([rows[i] for i in before], dtype=torch.float64, device="cpu").reshape(-1, INFO_COLUMNS)

    def restore(self) -> None:
        """Give every S of the step under way its value before it."""
        for product, core in self._cores:
            product.core.detach().copy_(core)


def _wide(U: Tensor, S: Tensor, V: Tensor) -> Triple:
    """The three in one dtype that has factorisations: bfloat16 and float16 become float32."""
    dtype = torch.promote_types(torch.promote_types(U.dtype, S.dtype), V.dtype)
    if dtype in targets.HALF_DTYPES:
        dtype = torch.float32
    return U.to(dtype), S.to(dtype), V.to(dtype)

"""Between the Gram blocks of the kernels and the flat buffers that processes add up (``signatures.PHASES``).

And the solve of a step whose Gram matrix is ill-conditioned, by these sums alone: others have more of its rows. Of each
factor a buffer holds a square block by rows, the upper triangle of a symmetric one by rows, and of ``sums`` a norm
behind them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ...operators.status import LARGEST_NORM
from ..launch.table import ROW
from .small import (
    add_transposed,
    block,
    combine,
    identity_block,
    inner,
    inverse_root_series,
    multiply,
    store_block,
    trace_and_spread,
)

_ROW = tl.constexpr(ROW)
_LARGEST_NORM = tl.constexpr(LARGEST_NORM)


@triton.jit
def pack_kernel(
    table,
    places,
    partials,
    norms,
    flat,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
    TO: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """The last two of BLOCKS (R, R) an item, summed over the items of a factor, and with NORM the norm of ``norms``.

    A program along the second axis has T rows. Of a factor without items, here, all is zero.
    """
    factor = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * T
    header = table + factor * _ROW
    r = tl.load(header + 1).to(tl.int32)
    first, count = tl.load(header + 2), tl.load(header + 3).to(tl.int32)
    at = flat + tl.load(places + factor) + (factor if NORM else 0)
    base = partials + first * (BLOCKS * R * R) + (BLOCKS - 2) * (R * R)
    for j in range(0, r, T):
        a, b = i + tl.arange(0, T), j + tl.arange(0, T)
        inside = (a < r)[:, None] & (b < r)[None, :]
        full = sum_of_blocks(base, count, BLOCKS * R * R, i, j, r, R, T, TO)
        tl.store(at + a[:, None] * r + b[None, :], full, mask=inside)
        if j + T > i:
            symmetric = sum_of_blocks(base + R * R, count, BLOCKS * R * R, i, j, r, R, T, TO)
            upper = inside & (a[:, None] <= b[None, :])
            tl.store(at + r * r + place_in_triangle(a[:, None], b[None, :], r), symmetric, mask=upper)
    if NORM and i == 0:
        squares = tl.zeros((ITEMS,), dtype=tl.float64)
        for start in range(0, count, ITEMS):
            k = start + tl.arange(0, ITEMS)
            norm = tl.load(norms + first + k, mask=k < count, other=0.0).to(tl.float64)
            norm = tl.where(norm > _LARGEST_NORM, _LARGEST_NORM, norm)  # NaN stays
            squares += norm * norm
        norm = tl.sqrt(tl.sum(squares, axis=0))
        norm = tl.where(norm > _LARGEST_NORM, _LARGEST_NORM, norm)
        tl.store(at + r * r + r * (r + 1) // 2, norm.to(TO))


@triton.jit
def place_in_triangle(a, b, r):
    """Of element (a, b), a <= b, in the upper triangle by rows."""
    return a * r - a * (a + 1) // 2 + b


@triton.jit
def sum_of_blocks(base, count, stride, i, j, r, R: tl.constexpr, T: tl.constexpr, TO: tl.constexpr):
    """The block at (i, j) of the sum of ``count`` matrices ``stride`` apart, compensated (Kahan 1965)."""
    total = tl.zeros((T, T), dtype=TO)
    lost = tl.zeros((T, T), dtype=TO)
    for k in range(0, count):
        term = block(base + k * stride, i, j, r, R, T) - lost
        grown = total + term
        lost = (grown - total) - term
        total = grown
    return total


@triton.jit(do_not_specialize_on_alignment=["sums", "grams"])
def unpack_kernel(
    table,
    places,
    sums,
    grams,
    blocks,
    COUPLING: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """Of each factor K (R, R) from ``sums``, with COUPLING, else C from ``sums`` and A and D from ``grams``."""
    factor = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * T
    r = tl.load(table + factor * _ROW + 1).to(tl.int32)
    place = tl.load(places + factor)
    square = r * r
    out = blocks + factor * ((1 if COUPLING else 3) * R * R)
    for j in range(0, r, T):
        a, b = i + tl.arange(0, T), j + tl.arange(0, T)
        inside = (a < r)[:, None] & (b < r)[None, :]
        full = a[:, None] * r + b[None, :]
        if COUPLING:
            store_block(out, i, j, tl.load(sums + place + factor + full, mask=inside, other=0.0), r, R, T)
        else:
            low, high = tl.minimum(a[:, None], b[None, :]), tl.maximum(a[:, None], b[None, :])
            upper = square + place_in_triangle(low, high, r)
            store_block(out, i, j, tl.load(sums + place + factor + upper, mask=inside, other=0.0), r, R, T)
            store_block(out + R * R, i, j, tl.load(grams + place + full, mask=inside, other=0.0), r, R, T)
            store_block(out + 2 * R * R, i, j, tl.load(grams + place + upper, mask=inside, other=0.0), r, R, T)


@triton.jit
def solve_in_float64(
    blocks, W, F, work, tolerance, r, R: tl.constexpr, T: tl.constexpr, T64: tl.constexpr, TO: tl.constexpr
):  # fmt: skip
    """W = B G^(−1/2) and F = G^(−1/2) from C, A and D at ``blocks``; status, a bound on the residual, steps.

    As ``reference.sharded.solve`` and what ``operators.phases`` makes of it: G is known to 8 sqrt(r) u (u the
    ``tolerance``) of the terms it is made of, and where that is above a quarter of its least eigenvalue it has no root.
    A workspace of float64 is used; W and F are of TO.
    """
    C, A, one, two, three = work, work + R * R, work + 2 * R * R, work + 3 * R * R, work + 4 * R * R
    G, B, D = work + 5 * R * R, work + 6 * R * R, work + 7 * R * R
    combine(C, 1.0, blocks, 0.0, blocks, 0.0, r, R, T, TO)
    combine(A, 1.0, blocks + R * R, 0.0, blocks + R * R, 0.0, r, R, T, TO)
    combine(D, 1.0, blocks + 2 * R * R, 0.0, blocks + 2 * R * R, 0.0, r, R, T, TO)
    add_transposed(B, 0.0, A, -0.5, A, r, R, T64)
    combine(B, 1.0, B, 0.0, B, 1.0, r, R, T64, tl.float64)
    multiply(C, B, one, r, R, T64, "ieee", tl.float64)
    multiply(B, one, two, r, R, T64, "ieee", tl.float64)
    multiply(B, A, three, r, R, T64, "ieee", tl.float64)
    combine(G, 1.0, two, 1.0, D, 0.0, r, R, T64, tl.float64)
    add_transposed(G, 1.0, G, 1.0, three, r, R, T64)
    trace, _high, _low = trace_and_spread(G, r, R, T64, tl.float64)
    terms = tl.maximum(largest_diagonal(D, r, R, T64), 1.0)
    status = tl.full((), 2.0, tl.float64)
    error = tl.full((), float("nan"), tl.float64)
    steps = 0
    if (trace > 0.0) & (trace < float("inf")):
        combine(three, 1.0 / trace, G, 0.0, G, 0.0, r, R, T64, tl.float64)
        most = spectral_norm(three, one, two, r, R, T64)
        combine(work, -1.0 / most, three, 0.0, three, 1.0, r, R, T64, tl.float64)
        unit = tl.full((), 1.0, tl.float64)
        steps += inverse_root_series(work, unit, 1e-16, r, R, T64, "ieee", tl.float64, True)
        left = tl.sqrt(inner(work, work, r, R, T64, tl.float64))
        if left < 1e-12:  # NaN is not
            zeta = work + R * R
            combine(D, 1.0, zeta, 0.0, zeta, 1.0, r, R, T64, tl.float64)
            inverse = spectral_norm(D, one, two, r, R, T64)
            condition = inverse * inverse
            growth = tl.maximum(terms / (most * trace), 1.0)
            found = 8.0 * tl.sqrt(r.to(tl.float64)) * tolerance * condition * growth
            if found <= 0.25:
                status = tl.full((), 0.0, tl.float64)
                error = found
                root = 1.0 / tl.sqrt(most * trace)
                multiply(B, D, one, r, R, T64, "ieee", tl.float64)
                combine(W, root, one, 0.0, one, 0.0, r, R, T64, tl.float64)
                combine(F, root, D, 0.0, D, 0.0, r, R, T64, tl.float64)
    return status, error, steps


@triton.jit
def largest_diagonal(a, r, R: tl.constexpr, T: tl.constexpr):
    """The largest element of the diagonal, of those above zero."""
    most = tl.zeros((T,), dtype=tl.float64)
    for i in range(0, r, T):
        on = block(a, i, i, r, R, T) * identity_block(i, i, r, T, tl.float64)
        most = tl.maximum(most, tl.sum(on, axis=1))
    return tl.max(most, axis=0)


@triton.jit
def spectral_norm(a, one, two, r, R: tl.constexpr, T: tl.constexpr):
    """Of a symmetric positive semidefinite matrix, too large by a factor of r^(1/256) at most: 1.02.

    The Frobenius norm of a^128, by seven squarings of what is scaled to norm 1; ``one`` and ``two`` are overwritten.
    """
    norm = tl.sqrt(inner(a, a, r, R, T, tl.float64))
    combine(one, 1.0 / norm, a, 0.0, a, 0.0, r, R, T, tl.float64)
    power = tl.full((), 0.5, tl.float64)
    for _ in range(0, 7):
        multiply(one, one, two, r, R, T, "ieee", tl.float64)
        size = tl.sqrt(inner(two, two, r, R, T, tl.float64))
        combine(one, 1.0 / size, two, 0.0, two, 0.0, r, R, T, tl.float64)
        norm *= tl.exp(power * tl.log(size))
        power *= 0.5
    return norm

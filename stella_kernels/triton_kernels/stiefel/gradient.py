"""∇ ← ∇ − Y (∇ᵀY) over many factors: the coupling ∇ᵀY in one pass over the rows, its sum, the update in another.

What would overflow is known before anything is written (``range.py``).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ..launch.table import FIELDS
from .range import attempt, norm_from, norm_of, range_of
from .tiles import (
    LEAVE,
    MOVE,
    ROW,
    add_apart,
    load_rows,
    load_square,
    load_tile,
    product,
    rows_from,
    rows_left,
    store_square,
    store_tile,
    sum_partials,
    tensor_of,
    times_square,
)
from .tiles import where_of as where_of

_ROW = tl.constexpr(ROW)
_FIELDS = tl.constexpr(FIELDS)
_MOVE = tl.constexpr(MOVE)
_LEAVE = tl.constexpr(LEAVE)


@triton.jit
def coupling_kernel(
    items,
    table,
    partials,
    largest,
    refused,
    one,
    ELEMENT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTOR: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DRIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
):
    """Of a chunk of rows: ∇ᵀY to ``partials``, and to ``largest`` max |∇| (with NORM ‖∇‖_F), or NaN where ∇ is not
    finite.

    Where the coupling is known (header 4), only the latter. With DRIFT YᵀY follows ∇ᵀY; where registers hold one of the
    two only, SPLIT, the programs along the second axis take one each.
    """
    item, factor, n, r, begin = where_of(table, items)
    if item == 0:
        tl.store(refused, 0)
    known = tl.load(table + factor * _ROW + 4) != 0
    columns = tl.arange(0, R)
    end = tl.minimum(begin + CHUNK, n)
    part = tl.program_id(1)  # 1: Y in the place of ∇
    shift = part * ((FACTOR - GRADIENT) * _FIELDS)
    gradient = tensor_of(table + shift, factor, GRADIENT, begin, ELEMENT)
    own = tensor_of(table, factor, FACTOR, begin, ELEMENT)
    left = rows_left(n, begin)
    coupling = tl.zeros((R, R), dtype=TO)
    BOTH: tl.constexpr = DRIFT and not SPLIT
    if BOTH:
        square = tl.zeros((R, R), dtype=TO)
    tainted = tl.zeros((BLOCK, R), dtype=TO)
    size = tl.zeros((BLOCK, R), dtype=TO)
    for start in range(begin, end, BLOCK):
        rows = rows_from(begin, start, BLOCK)
        g = load_tile(gradient, rows, columns, left, r, ELEMENT, TO, INDEX)  # (BLOCK, R)
        tainted += g * (g if NORM else 0.0)
        size = tl.maximum(size, tl.abs(g))
        if not known:
            y = load_tile(own, rows, columns, left, r, ELEMENT, TO, INDEX)  # (BLOCK, R)
            coupling = add_apart(coupling, product(tl.trans(g), y, PRECISION, TO), one)
            if BOTH:
                tl.debug_barrier()  # one product's operands are in registers at a time
                square = add_apart(square, product(tl.trans(y), y, PRECISION, TO), one)
    tainted_sum = tl.sum(tl.sum(tainted, axis=1), axis=0)
    if part == 0:
        most = tl.max(tl.max(size, axis=1), axis=0)
        if NORM:
            tl.store(largest + item, norm_from(tainted_sum, most, (end - begin) * r))
        else:
            tl.store(largest + item, most + tainted_sum)
    BLOCKS: tl.constexpr = 2 if DRIFT else 1
    if not known:
        store_square(partials + item * (BLOCKS * R * R) + part * (R * R), coupling, r, R)
        if BOTH:
            store_square(partials + item * (BLOCKS * R * R) + R * R, square, r, R)


@triton.jit
def coupling_sum_kernel(
    table,
    settings,
    partials,
    largest,
    refused,
    couplings,
    state,
    info,
    ELEMENT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTOR: tl.constexpr,
    DRIFT: tl.constexpr,
    R: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """A program for each factor: its coupling, whether it is to move, and its row of ``info``.

    An overflow refuses them all, of riemannian_gradient_ (DRIFT) unless the factor is far from orthonormal. What a
    bound does not rule out is tried.
    """
    factor = tl.program_id(0).to(tl.int64)
    header = table + factor * _ROW
    n = tl.load(header)
    r = tl.load(header + 1).to(tl.int32)
    first = tl.load(header + 2)
    count = tl.load(header + 3)
    known = tl.load(header + 4)
    tainted = tl.zeros((ITEMS,), dtype=TO)
    sizes = tl.zeros((ITEMS,), dtype=TO)
    for start in range(0, count, ITEMS):
        k = start + tl.arange(0, ITEMS)
        size = tl.load(largest + first + k, mask=k < count, other=0.0)
        tainted += size * 0.0
        sizes = tl.maximum(sizes, size)
    bad = tl.sum(tainted, axis=0) != 0.0  # NaN is unequal
    BLOCKS: tl.constexpr = 2 if DRIFT else 1
    parts = partials + first * (BLOCKS * R * R)
    drift = tl.full((), float("nan"), TO)
    if DRIFT:
        drift = drift_of(parts + R * R, count, BLOCKS * R * R, r, R, SLAB, TO)
    if known == 1:  # given in float32
        given = tl.load(header + 5).to(tl.pointer_type(tl.float32))
        K = load_given(given, header, r, R, TO)
    elif known == 2:  # given in float64
        given = tl.load(header + 5).to(tl.pointer_type(tl.float64))
        K = load_given(given, header, r, R, TO)
    else:
        K = sum_partials(parts, count, BLOCKS * R * R, r, R, TO)
    at = couplings + factor * (R * R)
    store_square(at, K, r, R)
    lost = tl.sum(tl.sum(K * 0.0, axis=1), axis=0) != 0.0
    bound = tl.max(sizes, axis=0) + 2.0 * norm_of(K)
    if DRIFT:
        near = drift <= 3.0  # ‖Y‖₂ ≤ 2, as the bound has it
        bounded = near & (bound <= range_of(ELEMENT))
    else:
        bounded = (bound * bound <= 0.5 * range_of(ELEMENT)) & (bound <= 0.5 * range_of(ELEMENT))
    status = tl.where(bad, 1.0, 0.0)
    if (bad == 0) & (lost | (bounded == 0)):
        tl.debug_barrier()  # the coupling is read again
        sound, fits = attempt(
            table,
            settings,
            factor,
            at,
            n,
            r,
            GRADIENT,
            FACTOR,
            DRIFT == 0,
            ELEMENT,
            TO,
            PRECISION,
            INDEX,
            R,
            SLAB,
            BLOCK,
        )
        status = tl.where(sound, tl.where(fits, 0.0, 3.0), 1.0)
        status = tl.where(lost & (known != 0), 1.0, status)
    tl.store(state + factor, tl.where(status == 0.0, _MOVE, _LEAVE))
    refuses = bad | (status == 3.0)
    residual = tl.full((), 0.0, TO)
    if DRIFT:
        refuses = bad | (near & (status == 3.0))
    else:
        residual = tl.full((), float("nan"), TO)  # until it has moved
    if refuses:
        tl.atomic_or(refused, 1)
    column = tl.arange(0, 8)
    row = tl.where(column == 0, status, tl.where(column == 1, residual, 0.0)).to(tl.float64)
    row = tl.where(column == 4, drift.to(tl.float64), row)
    tl.store(info + factor * 5 + column, row, mask=column < 5)


@triton.jit
def drift_of(base, count, stride, r, R: tl.constexpr, SLAB: tl.constexpr, TO: tl.constexpr):
    """‖C − I‖, C the sum of ``count`` matrices as in :func:`sum_partials`, SLAB of its rows at a time."""
    square = tl.zeros((SLAB, R), dtype=TO)
    for first in range(0, R, SLAB):
        rows, columns = first + tl.arange(0, SLAB), tl.arange(0, R)
        total = load_rows(base, first, r, R, SLAB, TO)
        lost = tl.zeros((SLAB, R), dtype=TO)
        for k in range(1, count):
            term = load_rows(base + k * stride, first, r, R, SLAB, TO) - lost
            grown = total + term
            lost = (grown - total) - term
            total = grown
        total -= ((rows[:, None] == columns[None, :]) & (rows < r)[:, None]).to(TO)
        square += total * total
    return tl.sqrt(tl.sum(tl.sum(square, axis=1), axis=0))


@triton.jit
def load_given(given, header, r, R: tl.constexpr, TO: tl.constexpr):
    """A coupling that came as an argument, by its strides (header 6 and 7)."""
    i = tl.arange(0, R)
    mask = (i < r)[:, None] & (i < r)[None, :]
    offsets = (i * tl.load(header + 6))[:, None] + (i * tl.load(header + 7))[None, :]
    return tl.load(given + offsets, mask=mask, other=0.0).to(TO)


@triton.jit
def subtract_kernel(
    items,
    table,
    couplings,
    state,
    refused,
    ELEMENT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    SNAPSHOTS: tl.constexpr,
    R: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """∇ ← ∇ − Y K on a chunk of rows, and Y to its snapshot; nothing where any gradient is not finite."""
    _item, factor, n, r, begin = where_of(table, items)
    if tl.load(refused) == 0:
        moves = tl.load(state + factor) == _MOVE
        if SLAB == R:
            K = load_square(couplings + factor * (R * R), r, R, TO)
        columns = tl.arange(0, R)
        gradient, own = tensor_of(table, factor, 0, begin, ELEMENT), tensor_of(table, factor, 1, begin, ELEMENT)
        if SNAPSHOTS:
            snapshot = tensor_of(table, factor, 2, begin, ELEMENT)
        left = rows_left(n, begin)
        for start in range(begin, tl.minimum(begin + CHUNK, n), BLOCK):
            rows = rows_from(begin, start, BLOCK)
            if SLAB == R or SNAPSHOTS:
                y = load_tile(own, rows, columns, left, r, ELEMENT, TO, INDEX)  # (BLOCK, R)
            if SNAPSHOTS:
                store_tile(snapshot, rows, columns, left, r, y, ELEMENT, INDEX)
            if moves:
                if SLAB == R:
                    along = product(y, K, PRECISION, TO)
                else:
                    at = couplings + factor * (R * R)
                    along = times_square(own, rows, left, r, at, ELEMENT, TO, PRECISION, INDEX, R, SLAB, BLOCK)
                g = load_tile(gradient, rows, columns, left, r, ELEMENT, TO, INDEX)  # (BLOCK, R)
                store_tile(gradient, rows, columns, left, r, g - along, ELEMENT, INDEX)

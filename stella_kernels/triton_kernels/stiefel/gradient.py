"""∇ ← ∇ − Y (∇ᵀY) over many factors: the coupling ∇ᵀY in one pass over the rows, its sum, the update in another."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LEAVE,
    MOVE,
    ROW,
    add_apart,
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
_MOVE = tl.constexpr(MOVE)
_LEAVE = tl.constexpr(LEAVE)


@triton.jit
def coupling_kernel(
    items,
    table,
    partials,
    poison,
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
):
    """Of a chunk of rows: ∇ᵀY to ``partials``, and to ``poison`` a zero, or NaN where ∇ is not finite.

    Where the coupling is known (header 4), only the latter.
    """
    item, factor, n, r, begin = where_of(table, items)
    begin = tl.multiple_of(begin, CHUNK)
    if item == 0:
        tl.store(refused, 0)
    known = tl.load(table + factor * _ROW + 4) != 0
    columns = tl.arange(0, R)
    end = tl.minimum(begin + CHUNK, n)
    gradient, own = tensor_of(table, factor, GRADIENT, begin, ELEMENT), tensor_of(table, factor, FACTOR, begin, ELEMENT)
    left = rows_left(n, begin)
    coupling = tl.zeros((R, R), dtype=TO)
    tainted = tl.zeros((BLOCK, R), dtype=TO)
    for start in range(begin, end, BLOCK):
        rows = rows_from(begin, start, BLOCK)
        g = load_tile(gradient, rows, columns, left, r, ELEMENT, TO, INDEX)  # (BLOCK, R)
        tainted += g * 0.0
        if not known:
            y = load_tile(own, rows, columns, left, r, ELEMENT, TO, INDEX)  # (BLOCK, R)
            coupling = add_apart(coupling, product(tl.trans(g), y, PRECISION, TO), one)
    tl.store(poison + item, tl.sum(tl.sum(tainted, axis=1), axis=0))
    if not known:
        store_square(partials + item * (R * R), coupling, r, R)


@triton.jit
def coupling_sum_kernel(
    table, partials, poison, refused, couplings, state, info, TO: tl.constexpr, R: tl.constexpr, ITEMS: tl.constexpr
):
    """A program for each factor: its coupling, whether ∇ and the coupling are finite, and its row of ``info``."""
    factor = tl.program_id(0).to(tl.int64)
    header = table + factor * _ROW
    r = tl.load(header + 1)
    first = tl.load(header + 2)
    count = tl.load(header + 3)
    known = tl.load(header + 4)
    tainted = tl.zeros((ITEMS,), dtype=TO)
    for start in range(0, count, ITEMS):
        k = start + tl.arange(0, ITEMS)
        tainted += tl.load(poison + first + k, mask=k < count, other=0.0)
    bad = tl.sum(tainted, axis=0) != 0.0  # NaN is unequal
    if known == 1:  # given in float32
        given = tl.load(header + 5).to(tl.pointer_type(tl.float32))
        K = load_given(given, header, r, R, TO)
    elif known == 2:  # given in float64
        given = tl.load(header + 5).to(tl.pointer_type(tl.float64))
        K = load_given(given, header, r, R, TO)
    else:
        K = sum_partials(partials + first * (R * R), count, R * R, r, R, TO)
    store_square(couplings + factor * (R * R), K, r, R)
    lost = tl.sum(tl.sum(K * 0.0, axis=1), axis=0) != 0.0
    tl.store(state + factor, tl.where(bad | lost, _LEAVE, _MOVE))
    if bad:
        tl.atomic_or(refused, 1)
    column = tl.arange(0, 4)
    status = tl.where(column == 0, tl.where(bad | lost, 1.0, 0.0), 0.0)
    tl.store(info + factor * 4 + column, status.to(tl.float64))


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
    begin = tl.multiple_of(begin, CHUNK)
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

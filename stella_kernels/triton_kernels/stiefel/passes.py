"""The two passes over the rows of many factors: Gram blocks of [Y, Δ], and the update from the solved coefficients."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .moves import ADAMW, POLAR, advance, constants_of, load_move, tensors_of
from .tiles import (
    MOVE,
    add_apart,
    load_rows,
    load_square,
    load_tile,
    product,
    product_apart,
    rows_from,
    rows_left,
    store_tile,
    times_square,
    where_of,
    whole_vectors,
)

_ADAMW = tl.constexpr(ADAMW)
_POLAR = tl.constexpr(POLAR)
_MOVE = tl.constexpr(MOVE)


@triton.jit
def gram_kernel(
    items,
    table,
    settings,
    couplings,
    state,
    refused,
    partials,
    one,
    KIND: tl.constexpr,
    ADVANCE: tl.constexpr,
    GRAM: tl.constexpr,
    HALVES: tl.constexpr,
    APART: tl.constexpr,
    STEPS: tl.constexpr,
    ELEMENT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of a chunk of rows: YᵀY, YᵀΔ and ΔᵀΔ (of POLAR, MᵀM alone) to ``partials``, three (R, R) an item.

    With ADVANCE the moments take their step first. Where three (R, R) accumulators do not fit the registers, programs
    along the second axis take SLAB columns of them each, and the moments have been advanced by a launch before.
    Nothing is done for a factor that is not to move, or for any where a gradient was refused.
    """
    item, factor, n, r, begin = where_of(table, items)
    first = tl.program_id(1) * SLAB
    proceed = True
    if KIND == _ADAMW:
        proceed = (tl.load(state + factor) == _MOVE) & (tl.load(refused) == 0)
    if proceed:
        columns, slab = tl.arange(0, R), first + tl.arange(0, SLAB)
        # YᵀY, YᵀΔ and ΔᵀΔ (C, A, D), of POLAR MᵀM alone, each as one tile or as two of half the columns; where many
        # warps share the columns, [Y Δ]ᵀY and [Y Δ]ᵀΔ (C, D), whose operand on the left is one
        TALL: tl.constexpr = R > 32 and KIND != _POLAR
        WIDTH: tl.constexpr = SLAB // 2 if HALVES else SLAB
        C = tl.zeros((2 * R if TALL else R, WIDTH), dtype=TO)
        A, D = C, C
        if HALVES:
            C2, A2, D2 = C, C, C
        at = couplings + factor * (R * R)
        constants = constants_of(settings, factor, KIND, TO)
        left = rows_left(n, begin)
        if ADVANCE and SLAB == R:
            K = load_square(at, r, R, TO)
        for start in range(begin, tl.minimum(begin + CHUNK, n), BLOCK):
            rows = rows_from(begin, start, BLOCK)
            tensors = tensors_of(table, factor, begin, KIND, STEPS, ELEMENT)  # not kept beside the accumulators
            if ADVANCE:
                if SLAB == R:
                    y = load_tile(tensors[0], rows, columns, left, r, ELEMENT, TO, INDEX)
                    along = product_apart(y, K, one, PRECISION, TO) if APART else product(y, K, PRECISION, TO)
                else:
                    along = times_square(tensors[0], rows, left, r, at, ELEMENT, TO, PRECISION, INDEX, R, SLAB, BLOCK)
                d = advance(tensors, constants, along, rows, columns, left, r, STEPS, ELEMENT, TO, INDEX)
            else:
                y, d = load_move(tensors, constants, rows, columns, left, r, KIND, STEPS, ELEMENT, TO, INDEX)
            if GRAM:
                if SLAB == R:
                    ys, ds = y, d
                else:
                    ys, ds = load_move(tensors, constants, rows, slab, left, r, KIND, STEPS, ELEMENT, TO, INDEX)
                x = beside(y, d) if TALL else y
                if HALVES:
                    y1, y2 = halves(ys)
                    d1, d2 = halves(ds)
                    C, A, D = accumulate(C, A, D, x, d, y1, d1, one, KIND, TALL, PRECISION, TO)
                    tl.debug_barrier()
                    C2, A2, D2 = accumulate(C2, A2, D2, x, d, y2, d2, one, KIND, TALL, PRECISION, TO)
                else:
                    C, A, D = accumulate(C, A, D, x, d, ys, ds, one, KIND, TALL, PRECISION, TO)
        if GRAM:
            at = partials + item * (3 * R * R)
            part = first + tl.arange(0, WIDTH)
            store_blocks(at, C, A, D, part, r, KIND, TALL, R)
            if HALVES:
                store_blocks(at, C2, A2, D2, part + WIDTH, r, KIND, TALL, R)


@triton.jit
def beside(a, b):
    """[a b], of two tiles of one shape."""
    ROWS: tl.constexpr = a.shape[0]
    WIDTH: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, 2 * WIDTH))


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def accumulate(
    C, A, D, x, d, ys, ds, one, KIND: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr, TO: tl.constexpr
):  # fmt: skip
    """C + XᵀYₛ, A + YᵀΔₛ and D + ΔᵀΔₛ of a tile of rows, X = Y; with TALL X = [Y Δ], and D + XᵀΔₛ; of POLAR C alone."""
    C = add_apart(C, product(tl.trans(x), ys, PRECISION, TO), one)
    if KIND != _POLAR:
        if not TALL:
            A = add_apart(A, product(tl.trans(x), ds, PRECISION, TO), one)
        tl.debug_barrier()  # one product's operands are in registers at a time
        D = add_apart(D, product(tl.trans(x if TALL else d), ds, PRECISION, TO), one)
    return C, A, D


@triton.jit
def store_blocks(at, C, A, D, columns, r, KIND: tl.constexpr, TALL: tl.constexpr, R: tl.constexpr):
    """Columns of YᵀY, YᵀΔ and ΔᵀΔ of an item; the lower half of a TALL C, ΔᵀY, is the second's transpose."""
    rows = tl.arange(0, C.shape[0])
    at += rows[:, None] * R + columns[None, :]
    tl.store(at, C, mask=whole_vectors(rows, columns, r))
    if KIND != _POLAR:
        mask = whole_vectors(rows % R, columns, r)
        if not TALL:
            tl.store(at + R * R, A, mask=mask)
        tl.store(at + (R * R if TALL else 2 * R * R), D, mask=mask)


@triton.jit
def update_kernel(
    items,
    table,
    settings,
    coefficients,
    scales,
    state,
    KIND: tl.constexpr,
    STEPS: tl.constexpr,
    ELEMENT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(Y + Δ) · scale + Y W + Δ F on a chunk of rows, in place; of POLAR Q = (M + M F) · scale."""
    _item, factor, n, r, begin = where_of(table, items)
    if tl.load(state + factor) == _MOVE:
        columns = tl.arange(0, R)
        KEPT: tl.constexpr = R == 16  # past that addresses do not fit beside the coefficients
        scale = tl.load(scales + factor)
        constants = constants_of(settings, factor, KIND, TO)
        if KEPT:
            tensors = tensors_of(table, factor, begin, KIND, STEPS, ELEMENT)
        left = rows_left(n, begin)
        at = coefficients + factor * (2 * R * R)
        if SLAB == R:
            F = load_square(at + R * R, r, R, TO)
            if KIND != _POLAR:
                W = load_square(at, r, R, TO)
        for start in range(begin, tl.minimum(begin + CHUNK, n), BLOCK):
            rows = rows_from(begin, start, BLOCK)
            if not KEPT:
                tensors = tensors_of(table, factor, begin, KIND, STEPS, ELEMENT)
            if SLAB != R:
                new = tl.zeros((BLOCK, R), dtype=TO)
                for first in range(0, R, SLAB):
                    part = first + tl.arange(0, SLAB)
                    y, d = load_move(tensors, constants, rows, part, left, r, KIND, STEPS, ELEMENT, TO, INDEX)
                    new += product(d, load_rows(at + R * R, first, r, R, SLAB, TO), PRECISION, TO)
                    if KIND != _POLAR:
                        tl.debug_barrier()  # as in gram_kernel: one product's operands at a time
                        new += product(y, load_rows(at, first, r, R, SLAB, TO), PRECISION, TO)
            y, d = load_move(tensors, constants, rows, columns, left, r, KIND, STEPS, ELEMENT, TO, INDEX)
            if SLAB == R:
                new = product(d, F, PRECISION, TO)
                if KIND != _POLAR:
                    new += product(y, W, PRECISION, TO)
            new = (d + new) * scale if KIND == _POLAR else scale * y + (scale * d + new)
            tl.debug_barrier()  # a row's every column is read before one of them is written
            store_tile(tensors[1 if KIND == _POLAR else 0], rows, columns, left, r, new, ELEMENT, INDEX)

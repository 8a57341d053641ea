"""The two passes over the rows of many factors: Gram blocks of [Y, Δ], and the update from the solved coefficients."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .moves import ADAMW, POLAR, advance, load_move, rate_and_correction
from .tiles import MOVE, add_apart, load_slab, load_square, load_tile, product, rows_from, store_tile, where_of

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
    skip,
    KIND: tl.constexpr,
    ADVANCE: tl.constexpr,
    GRAM: tl.constexpr,
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
    Nothing is done for a factor that is not to move, or for any where a gradient was refused and ``skip`` is 0.
    """
    item, factor, n, r, begin = where_of(table, items)
    begin = tl.multiple_of(begin, CHUNK)
    first = tl.program_id(1) * SLAB
    proceed = True
    if KIND == _ADAMW:
        proceed = (tl.load(state + factor) == _MOVE) & ((tl.load(refused) == 0) | (skip != 0))
    if proceed:
        columns, slab = tl.arange(0, R), first + tl.arange(0, SLAB)
        C = tl.zeros((R, SLAB), dtype=TO)
        A = tl.zeros((R, SLAB), dtype=TO)
        D = tl.zeros((R, SLAB), dtype=TO)
        at = couplings + factor * (R * R)
        if ADVANCE:
            constants = rate_and_correction(settings, factor, TO)
            if SLAB == R:
                K = load_square(at, r, R, TO)
        for start in range(begin, tl.minimum(begin + CHUNK, n), BLOCK):
            rows = rows_from(begin, start, BLOCK)
            if ADVANCE:
                y = load_tile(table, factor, 0, begin, rows, columns, n, r, ELEMENT, TO, INDEX)
                if SLAB == R:
                    d = advance(
                        *(table, factor, settings, constants, y, K, begin, rows, columns),
                        *(n, r, STEPS, ELEMENT, TO, PRECISION, INDEX),
                    )
                else:
                    for part in range(0, R, SLAB):
                        Ks = load_slab(at, part, r, R, SLAB, TO)
                        advance(
                            *(table, factor, settings, constants, y, Ks, begin, rows, part + tl.arange(0, SLAB)),
                            *(n, r, STEPS, ELEMENT, TO, PRECISION, INDEX),
                        )
            else:
                y, d = load_move(table, factor, settings, begin, rows, columns, n, r, KIND, STEPS, ELEMENT, TO, INDEX)
            if GRAM:
                if SLAB == R:
                    ys, ds = y, d
                else:
                    ys, ds = load_move(
                        table, factor, settings, begin, rows, slab, n, r, KIND, STEPS, ELEMENT, TO, INDEX
                    )
                yt = tl.trans(y)
                C = add_apart(C, product(yt, ys, PRECISION, TO), one)
                if KIND != _POLAR:
                    tl.debug_barrier()  # one product's operands are in registers at a time
                    A = add_apart(A, product(yt, ds, PRECISION, TO), one)
                    tl.debug_barrier()
                    D = add_apart(D, product(tl.trans(d), ds, PRECISION, TO), one)
        if GRAM:
            mask = (columns < r)[:, None] & (slab < r)[None, :]
            at = partials + item * (3 * R * R) + columns[:, None] * R + slab[None, :]
            tl.store(at, C, mask=mask)
            if KIND != _POLAR:
                tl.store(at + R * R, A, mask=mask)
                tl.store(at + 2 * R * R, D, mask=mask)


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
    begin = tl.multiple_of(begin, CHUNK)
    if tl.load(state + factor) == _MOVE:
        columns = tl.arange(0, R)
        scale = tl.load(scales + factor)
        at = coefficients + factor * (2 * R * R)
        if SLAB == R:
            F = load_square(at + R * R, r, R, TO)
            if KIND != _POLAR:
                W = load_square(at, r, R, TO)
        for start in range(begin, tl.minimum(begin + CHUNK, n), BLOCK):
            rows = rows_from(begin, start, BLOCK)
            y, d = load_move(table, factor, settings, begin, rows, columns, n, r, KIND, STEPS, ELEMENT, TO, INDEX)
            if SLAB == R:
                new = product(d, F, PRECISION, TO)
                if KIND == _POLAR:
                    new = (d + new) * scale
                else:
                    new += product(y, W, PRECISION, TO)
                    new = scale * y + (scale * d + new)
                tl.debug_barrier()  # a row's every column is read before one of them is written
                store_tile(table, factor, 1 if KIND == _POLAR else 0, begin, rows, columns, n, r, new, ELEMENT, INDEX)
            else:
                for first in range(0, R, SLAB):
                    slab = first + tl.arange(0, SLAB)  # columns that are not written yet
                    ys, ds = load_move(
                        *(table, factor, settings, begin, rows, slab, n, r, KIND, STEPS, ELEMENT, TO, INDEX)
                    )
                    new = product(d, load_slab(at + R * R, first, r, R, SLAB, TO), PRECISION, TO)
                    tl.debug_barrier()  # as in gram_kernel: one product's operands at a time
                    if KIND == _POLAR:
                        new = (ds + new) * scale
                    else:
                        new += product(y, load_slab(at, first, r, R, SLAB, TO), PRECISION, TO)
                        new = scale * ys + (scale * ds + new)
                    tl.debug_barrier()
                    store_tile(table, factor, 1 if KIND == _POLAR else 0, begin, rows, slab, n, r, new, ELEMENT, INDEX)

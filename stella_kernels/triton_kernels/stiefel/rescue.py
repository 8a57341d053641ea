"""The polar factor where one Gram matrix in the working precision is not enough: float64, and repeated."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .moves import ADAMW, POLAR, constants_of, load_move, tensors_of
from .small import add_transposed, block, combine, identity_block, inner, inverse_root_series, multiply, store_block
from .tiles import ROW, load_tile, product, rows_left, store_tile, tensor_of

PASSES = 12

_ADAMW = tl.constexpr(ADAMW)
_POLAR = tl.constexpr(POLAR)
_ROW = tl.constexpr(ROW)
_PASSES = tl.constexpr(PASSES)


@triton.jit
def load_rows_of(
    table, factor, constants, start, rows, columns, n, r, KIND: tl.constexpr, STEPS: tl.constexpr,
    ELEMENT: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """:func:`load_move` at (start + rows, columns), in float64; a rescue walks all rows of a factor."""
    tensors = tensors_of(table, factor, start, KIND, STEPS, ELEMENT)
    left = rows_left(n, start)
    return load_move(tensors, constants, rows, columns, left, r, KIND, STEPS, ELEMENT, tl.float64, INDEX, False)


@triton.jit
def combined_tile(
    table, factor, constants, W, start, first, n, r, KIND: tl.constexpr, STEPS: tl.constexpr, ELEMENT: tl.constexpr,
    INDEX: tl.constexpr, R: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Rows from ``start``, columns [first, first + T), of X = Y W₀ + Δ W₁, in float64; of POLAR X = M W₁."""
    total = tl.zeros((ROWS, T), dtype=tl.float64)
    rows = tl.arange(0, ROWS)
    for k in range(0, r, T):
        columns = k + tl.arange(0, T)
        y, d = load_rows_of(table, factor, constants, start, rows, columns, n, r, KIND, STEPS, ELEMENT, INDEX)
        total += product(d, block(W + R * R, k, first, r, R, T), "ieee", tl.float64)
        if KIND != _POLAR:
            total += product(y, block(W, k, first, r, R, T), "ieee", tl.float64)
    return total


@triton.jit
def combined_gram(
    table, factor, constants, W, G, n, r, KIND: tl.constexpr, STEPS: tl.constexpr, ELEMENT: tl.constexpr,
    INDEX: tl.constexpr, R: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """G = XᵀX."""
    for i in range(0, r, T):
        for j in range(0, r, T):
            total = tl.zeros((T, T), dtype=tl.float64)
            for start in range(0, n, ROWS):
                xi = combined_tile(table, factor, constants, W, start, i, n, r, KIND, STEPS, ELEMENT, INDEX, R, T, ROWS)
                xj = combined_tile(table, factor, constants, W, start, j, n, r, KIND, STEPS, ELEMENT, INDEX, R, T, ROWS)
                total += product(tl.trans(xi), xj, "ieee", tl.float64)
            store_block(G, i, j, total, r, R, T)
    tl.debug_barrier()


@triton.jit
def scaled_identity(out, scale, r, R: tl.constexpr, T: tl.constexpr):
    """out = scale I."""
    for i in range(0, r, T):
        for j in range(0, r, T):
            store_block(out, i, j, scale * identity_block(i, j, r, T, tl.float64), r, R, T)
    tl.debug_barrier()


@triton.jit
def rescue(
    table, factor, settings, work, KIND: tl.constexpr, STEPS: tl.constexpr, ELEMENT: tl.constexpr,
    INDEX: tl.constexpr, R: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Retract one factor by one program, in place; returns status, ‖QᵀQ − I‖ and iterations.

    X = [Y Δ] W starts as M = Y (I − symm(YᵀΔ)) + Δ, scaled into range, and W ← W (XᵀX + shift)^(−1/2) until XᵀX is the
    identity, at the round-off of float64. A Gram matrix loses what is below its round-off, of relative size κ² 2^−53;
    the shift keeps it positive, and a pass then takes κ to about κ 1e-7. What one pass loses is symmetric to first
    order, so that repetition ends at the polar factor of M itself, as near as κ times the round-off.
    """
    header = table + factor * _ROW
    n, r = tl.load(header), tl.load(header + 1).to(tl.int32)
    W, G, zeta = work + 6 * R * R, work, work + R * R
    one, two = work + 2 * R * R, work + 3 * R * R
    constants = constants_of(settings, factor, KIND, tl.float64)
    rows = tl.arange(0, ROWS)
    largest = tl.zeros((ROWS, T), dtype=tl.float64)
    tainted = tl.zeros((ROWS, T), dtype=tl.float64)
    for start in range(0, n, ROWS):
        for k in range(0, r, T):
            columns = k + tl.arange(0, T)
            y, d = load_rows_of(table, factor, constants, start, rows, columns, n, r, KIND, STEPS, ELEMENT, INDEX)
            largest = tl.maximum(largest, tl.abs(d))
            tainted += d * 0.0 + y * 0.0
            if KIND == _ADAMW:
                tensors = tensors_of(table, factor, start, KIND, STEPS, ELEMENT)
                for moment in tl.static_range(2, 4):
                    value = load_tile(
                        tensors[moment], rows, columns, rows_left(n, start), r, ELEMENT, tl.float64, INDEX, False
                    )
                    tainted += value * 0.0
    size = tl.max(tl.max(largest, axis=1), axis=0)
    status = tl.full((), 0.0, tl.float64)
    error = tl.full((), float("nan"), tl.float64)
    steps = 0
    if tl.sum(tl.sum(tainted, axis=1), axis=0) != 0.0:  # NaN is unequal
        status += 1.0
    elif (KIND == _POLAR) & (size == 0.0):
        status += 2.0
    else:
        scale = 1.0 / (size if KIND == _POLAR else tl.maximum(size, 1.0))
        if KIND != _POLAR:
            for i in range(0, r, T):  # YᵀΔ
                for j in range(0, r, T):
                    total = tl.zeros((T, T), dtype=tl.float64)
                    for start in range(0, n, ROWS):
                        y, _unused = load_rows_of(
                            table,
                            factor,
                            constants,
                            start,
                            rows,
                            i + tl.arange(0, T),
                            n,
                            r,
                            KIND,
                            STEPS,
                            ELEMENT,
                            INDEX,
                        )
                        _unused, d = load_rows_of(
                            table,
                            factor,
                            constants,
                            start,
                            rows,
                            j + tl.arange(0, T),
                            n,
                            r,
                            KIND,
                            STEPS,
                            ELEMENT,
                            INDEX,
                        )
                        total += product(tl.trans(y), d * scale, "ieee", tl.float64)
                    store_block(G, i, j, total, r, R, T)
            tl.debug_barrier()
            add_transposed(W, 0.0, G, -0.5, G, r, R, T)
            combine(W, 1.0, W, 0.0, W, scale, r, R, T, tl.float64)
        scaled_identity(W + R * R, scale, r, R, T)
        passes = 0
        going = True
        limit = 1e-15 * r if tl.float64 == ELEMENT else 1e-10
        # What is not as good as its storage goes to an SVD; of a step in float64 the rest is taken away below.
        stalled = 1e-14 * r if (KIND == _POLAR) & (tl.float64 == ELEMENT) else 1e-6
        while going:
            combined_gram(table, factor, constants, W, G, n, r, KIND, STEPS, ELEMENT, INDEX, R, T, ROWS)
            combine(one, 1.0, G, 0.0, G, -1.0, r, R, T, tl.float64)
            before = error
            error = tl.sqrt(inner(one, one, r, R, T, tl.float64))
            done = (error <= limit) | ((error < stalled) & (error >= 0.5 * before))
            if done | (passes >= _PASSES) | (error != error):
                going = False
                if not done:
                    status += 2.0
            else:
                near = error < 0.5
                c = tl.where(near, 1.0, tl.sqrt(inner(G, G, r, R, T, tl.float64)))
                shift = tl.where(near, 0.0, c * r * 4e-15)
                c += shift
                combine(G, -1.0 / c, G, 0.0, G, 1.0 - shift / c, r, R, T, tl.float64)
                e = tl.where(near, error, 1.0)
                steps += inverse_root_series(work, e, 1e-16, r, R, T, "ieee", tl.float64, True)
                combine(one, 1.0, zeta, 0.0, zeta, 1.0, r, R, T, tl.float64)
                root = 1.0 / tl.sqrt(c)
                if KIND != _POLAR:
                    multiply(W, one, two, r, R, T, "ieee", tl.float64)
                    combine(W, root, two, 0.0, two, 0.0, r, R, T, tl.float64)
                multiply(W + R * R, one, two, r, R, T, "ieee", tl.float64)
                combine(W + R * R, root, two, 0.0, two, 0.0, r, R, T, tl.float64)
            passes += 1
        if status == 0.0:
            OUT: tl.constexpr = 1 if KIND == _POLAR else 0
            write_combined(table, factor, constants, W, n, r, KIND, STEPS, ELEMENT, INDEX, R, T, ROWS, OUT)
            if (KIND != _POLAR) & (tl.float64 == ELEMENT):
                # Y W₀ and Δ W₁ are large and cancel where the step was long: what that left is taken away from Q itself
                scaled_identity(W + R * R, 1.0, r, R, T)
                combined_gram(table, factor, constants, W, G, n, r, _POLAR, False, ELEMENT, INDEX, R, T, ROWS)
                combine(G, -1.0, G, 0.0, G, 1.0, r, R, T, tl.float64)
                bound = tl.full((), 1e-3, tl.float64)
                steps += inverse_root_series(work, bound, 1e-16, r, R, T, "ieee", tl.float64, True)
                combine(W + R * R, 1.0, zeta, 0.0, zeta, 1.0, r, R, T, tl.float64)
                write_combined(table, factor, constants, W, n, r, _POLAR, False, ELEMENT, INDEX, R, T, ROWS, 0)
                error = tl.full((), 0.0, tl.float64)
            if tl.float64 == ELEMENT:  # of a Gram matrix and of a product near I: csrc/cpu/stiefel/residual.h
                root = tl.sqrt(r.to(tl.float64))
                error += 1.12e-16 * root * (10.0 + 1.25 * root)
    return status, error, steps


@triton.jit
def write_combined(
    table, factor, constants, W, n, r, KIND: tl.constexpr, STEPS: tl.constexpr, ELEMENT: tl.constexpr,
    INDEX: tl.constexpr, R: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    """X in the place of the factor: every column of a tile of rows is computed before one of them is written."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, R)
    for start in range(0, n, ROWS):
        total = tl.zeros((ROWS, R), dtype=tl.float64)
        for k in range(0, r, T):
            part = k + tl.arange(0, T)
            mask = (part < r)[:, None] & (columns < r)[None, :]
            at = part[:, None] * R + columns[None, :]
            y, d = load_rows_of(table, factor, constants, start, rows, part, n, r, KIND, STEPS, ELEMENT, INDEX)
            total += product(d, tl.load(W + R * R + at, mask=mask, other=0.0), "ieee", tl.float64)
            if KIND != _POLAR:
                total += product(y, tl.load(W + at, mask=mask, other=0.0), "ieee", tl.float64)
        tl.debug_barrier()
        out = tensor_of(table, factor, OUT, start, ELEMENT)
        store_tile(out, rows, columns, rows_left(n, start), r, total, ELEMENT, INDEX, False)
        tl.debug_barrier()

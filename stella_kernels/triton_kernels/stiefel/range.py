"""Whether what a step makes of a finite gradient stays finite as it is stored: by a bound, or tried."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .moves import ADAMW, adamw_delta, constants_of
from .tiles import load_tile, rows_left, tensor_of, times_square

_ADAMW = tl.constexpr(ADAMW)


@triton.jit
def range_of(ELEMENT: tl.constexpr):
    """The largest finite value of the dtype."""
    LARGEST: tl.constexpr = (
        1.797693134862315e308
        if ELEMENT.primitive_bitwidth == 64
        else 65504.0
        if tl.float16 == ELEMENT
        else 3.38953e38
        if tl.bfloat16 == ELEMENT
        else 3.402823e38
    )
    return LARGEST


@triton.jit
def norm_of(A):
    """Frobenius norm of a tile, whose squares may be out of range."""
    largest = tl.max(tl.max(tl.abs(A), axis=1), axis=0)
    scaled = A / tl.where(largest > 0.0, largest, 1.0)
    return largest * tl.sqrt(tl.sum(tl.sum(scaled * scaled, axis=1), axis=0))


@triton.jit
def norm_from(squares, most, count):
    """Frobenius norm from the sum of ``count`` squares and the largest value: a bound on it where the sum overflowed,
    NaN where a value is not finite."""
    bound = most * tl.sqrt(count.to(most.dtype))
    norm = tl.where(squares < float("inf"), tl.sqrt(squares), bound)
    return tl.where((squares == squares) & (most < float("inf")), norm, float("nan"))


@triton.jit
def as_stored(value, ELEMENT: tl.constexpr):
    """Zero, or NaN where a value is not finite once it is of this dtype."""
    wide = value
    if ELEMENT.primitive_bitwidth == 16:
        wide = value.to(tl.float32)  # no target narrows float64 to 16 bits in one step
    return wide.to(ELEMENT).to(wide.dtype) * 0.0


@triton.jit
def attempt(
    table, settings, factor, coupling, n, r, GRADIENT: tl.constexpr, FACTOR: tl.constexpr, ADVANCE: tl.constexpr,
    ELEMENT: tl.constexpr, TO: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, R: tl.constexpr,
    SLAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Whether a factor (with ADVANCE its moments too) is finite, and whether ∇ − Y K and the step made of it are.

    One program goes through all rows and writes nothing: for gradients that no bound clears.
    """
    columns, rows = tl.arange(0, R), tl.arange(0, BLOCK)
    given = tl.zeros((BLOCK, R), dtype=TO)
    made = tl.zeros((BLOCK, R), dtype=TO)
    if ADVANCE:
        constants = constants_of(settings, factor, _ADAMW, TO)
    for start in range(0, n, BLOCK):
        left = rows_left(n, start)
        own = tensor_of(table, factor, FACTOR, start, ELEMENT)
        y = load_tile(own, rows, columns, left, r, ELEMENT, TO, INDEX, False)  # (BLOCK, R)
        given += y * 0.0
        along = times_square(own, rows, left, r, coupling, ELEMENT, TO, PRECISION, INDEX, R, SLAB, BLOCK)
        gradient = tensor_of(table, factor, GRADIENT, start, ELEMENT)
        g = load_tile(gradient, rows, columns, left, r, ELEMENT, TO, INDEX, False) - along
        if ADVANCE:
            g *= constants[6]
            m = load_tile(
                tensor_of(table, factor, 2, start, ELEMENT), rows, columns, left, r, ELEMENT, TO, INDEX, False
            )
            v = load_tile(
                tensor_of(table, factor, 3, start, ELEMENT), rows, columns, left, r, ELEMENT, TO, INDEX, False
            )
            given += m * 0.0 + v * 0.0
            m += constants[3] * (g - m)
            v = constants[4] * v + constants[5] * g * g
            delta = adamw_delta(m, v, constants[0], constants[1], constants[2])
            inside = (rows < left)[:, None] & (columns < r)[None, :]
            made += as_stored(m, ELEMENT) + as_stored(v, ELEMENT) + tl.where(inside, delta, 0.0) * 0.0
        else:
            made += as_stored(g, ELEMENT)
    sound = tl.sum(tl.sum(given, axis=1), axis=0) == 0.0  # NaN is unequal
    fits = tl.sum(tl.sum(made, axis=1), axis=0) == 0.0
    return sound, fits

"""The move Δ of a factor, tile by tile: what was stepped to less what was there, or what AdamW steps."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_tile, store_tile, tensor_of

# What a grouped pass retracts, and its tensors in the table: POLAR: M, Q; RETRACT: moved, previous;
# ADAMW: Y, ∇, m, v, and the steps, of the arithmetic's dtype, where the moments' storage would round them.
POLAR, RETRACT, ADAMW = 0, 1, 2

# Columns of the settings of a factor, float64: those of the operator stella_adamw_.
SETTINGS = 7

_RETRACT = tl.constexpr(RETRACT)
_ADAMW = tl.constexpr(ADAMW)
_SETTINGS = tl.constexpr(SETTINGS)


@triton.jit
def constants_of(settings, factor, KIND: tl.constexpr, TO: tl.constexpr):
    """Of a factor, computed in float64 and once a program: what :func:`load_move` and :func:`advance` multiply by.

    Of ADAMW −lr / (1 − β₁ᵗ) / divisor, 1 / sqrt(1 − β₂ᵗ), eps, 1 − β₁, β₂, 1 − β₂ and the sign of the gradient; of
    RETRACT the first is 1 / divisor.
    """
    row = settings + factor * _SETTINGS
    rate, correction, eps, fresh1, kept2, fresh2, sign = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if KIND == _ADAMW:
        beta1, beta2, step = tl.load(row + 1), tl.load(row + 2), tl.load(row + 4)
        rate = -tl.load(row) / (1.0 - tl.exp(step * tl.log(beta1))) / tl.load(row + 5)
        correction = 1.0 / tl.sqrt(1.0 - tl.exp(step * tl.log(beta2)))
        eps, fresh1, kept2, fresh2, sign = tl.load(row + 3), 1.0 - beta1, beta2, 1.0 - beta2, tl.load(row + 6)
    elif KIND == _RETRACT:
        rate = 1.0 / tl.load(row + 5)
    return (
        tl.cast(rate, TO),
        tl.cast(correction, TO),
        tl.cast(eps, TO),
        tl.cast(fresh1, TO),
        tl.cast(kept2, TO),
        tl.cast(fresh2, TO),
        tl.cast(sign, TO),
    )


@triton.jit
def adamw_delta(m, v, rate, correction, eps):
    """The step from the moments after it."""
    return rate * m / (tl.sqrt(v) * correction + eps)


@triton.jit
def tensors_of(table, factor, start, KIND: tl.constexpr, STEPS: tl.constexpr, ELEMENT: tl.constexpr):
    """A factor's tensors from row ``start``, in the table's order; those that KIND has not are its first again."""
    first = tensor_of(table, factor, 0, start, ELEMENT)
    second = tensor_of(table, factor, 1, start, ELEMENT)
    third, fourth, fifth = first, first, first
    if KIND == _ADAMW:
        third = tensor_of(table, factor, 2, start, ELEMENT)
        fourth = tensor_of(table, factor, 3, start, ELEMENT)
    if STEPS:
        OWN: tl.constexpr = tl.float64 if ELEMENT.primitive_bitwidth == 64 else tl.float32
        fifth = tensor_of(table, factor, 4, start, OWN)
    return first, second, third, fourth, fifth


@triton.jit
def load_move(
    tensors, constants, rows, columns, left, r, KIND: tl.constexpr, STEPS: tl.constexpr, ELEMENT: tl.constexpr,
    TO: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr = True
):  # fmt: skip
    """Y and Δ at (rows, columns) of :func:`tensors_of`, with the factor's :func:`constants_of`; of POLAR, M twice."""
    OWN: tl.constexpr = tl.float64 if ELEMENT.primitive_bitwidth == 64 else tl.float32  # the step that was taken
    y = load_tile(tensors[1 if KIND == _RETRACT else 0], rows, columns, left, r, ELEMENT, TO, INDEX, WIDE)
    if KIND == _RETRACT:
        moved = load_tile(tensors[0], rows, columns, left, r, ELEMENT, TO, INDEX, WIDE)
        delta = (moved - y) * constants[0].to(TO)
    elif KIND == _ADAMW and STEPS:
        delta = load_tile(tensors[4], rows, columns, left, r, OWN, TO, INDEX, WIDE)
    elif KIND == _ADAMW:
        m = load_tile(tensors[2], rows, columns, left, r, ELEMENT, OWN, INDEX, WIDE)
        v = load_tile(tensors[3], rows, columns, left, r, ELEMENT, OWN, INDEX, WIDE)
        delta = adamw_delta(m, v, constants[0].to(OWN), constants[1].to(OWN), constants[2].to(OWN))
        inside = (rows < left)[:, None] & (columns < r)[None, :]
        delta = tl.where(inside, delta, 0.0).to(TO)  # eps may be 0
    else:
        delta = y
    return y, delta


@triton.jit
def advance(
    tensors, constants, along, rows, columns, left, r, STEPS: tl.constexpr, ELEMENT: tl.constexpr, TO: tl.constexpr,
    INDEX: tl.constexpr
):  # fmt: skip
    """Take the moments of a tile one step on, with g = sign (∇ − ``along``), where that is Y K; returns Δ.

    ``tensors`` and ``constants`` are of :func:`tensors_of` and :func:`constants_of`.
    """
    g = load_tile(tensors[1], rows, columns, left, r, ELEMENT, TO, INDEX)
    g = (g - along) * constants[6]
    tl.debug_barrier()  # the product's registers are free before the moments are addressed
    m = load_tile(tensors[2], rows, columns, left, r, ELEMENT, TO, INDEX)
    v = load_tile(tensors[3], rows, columns, left, r, ELEMENT, TO, INDEX)
    m += constants[3] * (g - m)
    v = constants[4] * v + constants[5] * g * g
    store_tile(tensors[2], rows, columns, left, r, m, ELEMENT, INDEX)
    store_tile(tensors[3], rows, columns, left, r, v, ELEMENT, INDEX)
    inside = (rows < left)[:, None] & (columns < r)[None, :]
    delta = tl.where(inside, adamw_delta(m, v, constants[0], constants[1], constants[2]), 0.0)
    if STEPS:
        store_tile(tensors[4], rows, columns, left, r, delta, TO, INDEX)
    return delta

"""The move Δ of a factor, tile by tile: what was stepped to less what was there, or what AdamW steps."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_tile, store_tile

# What a grouped pass retracts, and its tensors in the table: POLAR: M, Q; RETRACT: moved, previous;
# ADAMW: Y, ∇, m, v, and the steps where the moments' storage would round them.
POLAR, RETRACT, ADAMW = 0, 1, 2

# Columns of the settings of a factor, float64: those of the operator stella_adamw_.
SETTINGS = 7

_RETRACT = tl.constexpr(RETRACT)
_ADAMW = tl.constexpr(ADAMW)
_SETTINGS = tl.constexpr(SETTINGS)


@triton.jit
def rate_and_correction(settings, factor, TO: tl.constexpr):
    """−lr / (1 − β₁ᵗ) / divisor, 1 / sqrt(1 − β₂ᵗ) and eps, computed in float64."""
    row = settings + factor * _SETTINGS
    step = tl.load(row + 4)
    first = 1.0 - tl.exp(step * tl.log(tl.load(row + 1)))
    second = 1.0 - tl.exp(step * tl.log(tl.load(row + 2)))
    rate = -tl.load(row) / first / tl.load(row + 5)
    return rate.to(TO), (1.0 / tl.sqrt(second)).to(TO), tl.load(row + 3).to(TO)


@triton.jit
def adamw_delta(m, v, rate, correction, eps):
    """The step from the moments after it."""
    return rate * m / (tl.sqrt(v) * correction + eps)


@triton.jit
def load_move(
    table, factor, settings, start, rows, columns, n, r, KIND: tl.constexpr, STEPS: tl.constexpr,
    ELEMENT: tl.constexpr, TO: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr = True
):  # fmt: skip
    """Y and Δ at (start + rows, columns); of POLAR, M twice."""
    y = load_tile(table, factor, 1 if KIND == _RETRACT else 0, start, rows, columns, n, r, ELEMENT, TO, INDEX, WIDE)
    if KIND == _RETRACT:
        moved = load_tile(table, factor, 0, start, rows, columns, n, r, ELEMENT, TO, INDEX, WIDE)
        delta = (moved - y) * (1.0 / tl.load(settings + factor * _SETTINGS + 5)).to(TO)
    elif KIND == _ADAMW and STEPS:
        delta = load_tile(table, factor, 4, start, rows, columns, n, r, tl.float32, TO, INDEX, WIDE)
    elif KIND == _ADAMW:
        OWN: tl.constexpr = tl.float64 if ELEMENT.primitive_bitwidth == 64 else tl.float32  # the step that was taken
        rate, correction, eps = rate_and_correction(settings, factor, OWN)
        m = load_tile(table, factor, 2, start, rows, columns, n, r, ELEMENT, OWN, INDEX, WIDE)
        v = load_tile(table, factor, 3, start, rows, columns, n, r, ELEMENT, OWN, INDEX, WIDE)
        delta = adamw_delta(m, v, rate, correction, eps)
        inside = (start + rows < n)[:, None] & (columns < r)[None, :]
        delta = tl.where(inside, delta, 0.0).to(TO)  # eps may be 0
    else:
        delta = y
    return y, delta


@triton.jit
def advance(
    table, factor, settings, constants, along, start, rows, columns, n, r, STEPS: tl.constexpr, ELEMENT: tl.constexpr,
    TO: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Take the moments of a tile one step on, with g = sign (∇ − ``along``), where that is Y K; returns Δ.

    ``constants`` are of :func:`rate_and_correction`.
    """
    g = load_tile(table, factor, 1, start, rows, columns, n, r, ELEMENT, TO, INDEX)
    row = settings + factor * _SETTINGS
    beta1, beta2 = tl.load(row + 1), tl.load(row + 2)
    g = (g - along) * tl.load(row + 6).to(TO)
    tl.debug_barrier()  # the product's registers are free before the moments are addressed
    m = load_tile(table, factor, 2, start, rows, columns, n, r, ELEMENT, TO, INDEX)
    v = load_tile(table, factor, 3, start, rows, columns, n, r, ELEMENT, TO, INDEX)
    m += (1.0 - beta1).to(TO) * (g - m)
    v = beta2.to(TO) * v + (1.0 - beta2).to(TO) * g * g
    store_tile(table, factor, 2, start, rows, columns, n, r, m, ELEMENT, INDEX)
    store_tile(table, factor, 3, start, rows, columns, n, r, v, ELEMENT, INDEX)
    inside = (start + rows < n)[:, None] & (columns < r)[None, :]
    delta = tl.where(inside, adamw_delta(m, v, constants[0], constants[1], constants[2]), 0.0)
    if STEPS:
        store_tile(table, factor, 4, start, rows, columns, n, r, delta, tl.float32, INDEX)
    return delta

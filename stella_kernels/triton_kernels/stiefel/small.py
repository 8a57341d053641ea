"""Small dense algebra of one program on matrices in a workspace: (r, r), leading dimension R, taken T × T at a time.

A workspace is a program's own and stays in the nearest cache; barriers order what its threads write and read.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .tiles import product, whole_vectors


@triton.jit
def block(base, i, j, r, R: tl.constexpr, T: tl.constexpr):
    """Block with first element (i, j), zero outside (r, r)."""
    a, b = i + tl.arange(0, T), j + tl.arange(0, T)
    return tl.load(base + a[:, None] * R + b[None, :], mask=whole_vectors(a, b, r), other=0.0)


@triton.jit
def transposed_block(base, i, j, r, R: tl.constexpr, T: tl.constexpr):
    """:func:`block` of the transpose."""
    a, b = i + tl.arange(0, T), j + tl.arange(0, T)
    return tl.load(base + a[:, None] + b[None, :] * R, mask=(a < r)[:, None] & (b < r)[None, :], other=0.0)


@triton.jit
def store_block(base, i, j, value, r, R: tl.constexpr, T: tl.constexpr):
    """The counterpart of :func:`block`, in row-major order."""
    a, b = i + tl.arange(0, T), j + tl.arange(0, T)
    tl.store(base + a[:, None] * R + b[None, :], value, mask=whole_vectors(a, b, r))


@triton.jit
def identity_block(i, j, r, T: tl.constexpr, TO: tl.constexpr):
    """The block of the identity, zero outside (r, r)."""
    a, b = i + tl.arange(0, T), j + tl.arange(0, T)
    return ((a[:, None] == b[None, :]) & (a < r)[:, None]).to(TO)


@triton.jit
def multiply(a, b, out, r, R: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, TO: tl.constexpr):
    """out = a b; out is neither."""
    for i in range(0, r, T):
        for j in range(0, r, T):
            total = tl.zeros((T, T), dtype=TO)
            for k in range(0, r, T):
                total += product(block(a, i, k, r, R, T), block(b, k, j, r, R, T), PRECISION, TO)
            store_block(out, i, j, total, r, R, T)
    tl.debug_barrier()


@triton.jit
def combine(out, x, a, y, b, z, r, R: tl.constexpr, T: tl.constexpr, TO: tl.constexpr):
    """out = x a + y b + z I, element by element; out may be a or b."""
    for i in range(0, r, T):
        for j in range(0, r, T):
            value = x * block(a, i, j, r, R, T) + y * block(b, i, j, r, R, T)
            store_block(out, i, j, value + z * identity_block(i, j, r, T, TO), r, R, T)
    tl.debug_barrier()


@triton.jit
def add_transposed(out, x, a, y, b, r, R: tl.constexpr, T: tl.constexpr):
    """out = x a + y (b + bᵀ); out may be a, not b."""
    for i in range(0, r, T):
        for j in range(0, r, T):
            value = x * block(a, i, j, r, R, T)
            value += y * (block(b, i, j, r, R, T) + transposed_block(b, i, j, r, R, T))
            store_block(out, i, j, value, r, R, T)
    tl.debug_barrier()


@triton.jit
def sum_into(out, partials, count, stride, r, R: tl.constexpr, T: tl.constexpr, TO: tl.constexpr):
    """out = the sum of ``count`` matrices ``stride`` apart, in their order, compensated (Kahan 1965)."""
    for i in range(0, r, T):
        for j in range(0, r, T):
            total = block(partials, i, j, r, R, T)
            lost = tl.zeros((T, T), dtype=TO)
            for k in range(1, count):
                term = block(partials + k * stride, i, j, r, R, T) - lost
                grown = total + term
                lost = (grown - total) - term
                total = grown
            store_block(out, i, j, total, r, R, T)
    tl.debug_barrier()


@triton.jit
def inner(a, b, r, R: tl.constexpr, T: tl.constexpr, TO: tl.constexpr):
    """The sum of the elementwise product of a and b."""
    total = tl.zeros((T, T), dtype=TO)
    for i in range(0, r, T):
        for j in range(0, r, T):
            total += block(a, i, j, r, R, T) * block(b, i, j, r, R, T)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def trace_and_spread(a, r, R: tl.constexpr, T: tl.constexpr, TO: tl.constexpr):
    """trace, and of Gershgorin's discs the largest right and the smallest left end."""
    total = tl.zeros((T,), dtype=TO)
    high = tl.full((T,), float("-inf"), dtype=TO)
    low = tl.full((T,), float("inf"), dtype=TO)
    for i in range(0, r, T):
        inside = i + tl.arange(0, T) < r
        radius = tl.zeros((T,), dtype=TO)
        centre = tl.zeros((T,), dtype=TO)
        for j in range(0, r, T):
            value = block(a, i, j, r, R, T)
            on = value * identity_block(i, j, r, T, TO)
            centre += tl.sum(on, axis=1)
            radius += tl.sum(tl.abs(value - on), axis=1)
        total += centre
        high = tl.maximum(high, tl.where(inside, centre + radius, float("-inf")))
        low = tl.minimum(low, tl.where(inside, centre - radius, float("inf")))
    return tl.sum(total, axis=0), tl.max(high, axis=0), tl.min(low, axis=0)


@triton.jit
def remainder(e):
    """Norm of the residual after a step of the series from a residual of norm e."""
    return e * e * e * (0.625 + e * (0.234375 + e * 0.140625))


@triton.jit
def inverse_root_series(
    work, e, tolerance, r, R: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, TO: tl.constexpr,
    MEASURED: tl.constexpr
):  # fmt: skip
    """ζ with I + ζ = (I − N)^(−1/2), N symmetric: N in matrix 0 of the workspace, ζ to matrix 1; 2 to 5 are used.

    A step multiplies by T = I + N/2 + 3 N²/8, the head of the series (Higham, Functions of Matrices, 2008, section
    6.4); what is left is I − (I − N) T² = 5/8 N³ + 15/64 N⁴ + 9/64 N⁵, a polynomial in N: nothing that is near the
    identity is ever rounded. The number of steps follows from ``e``, a bound on the spectral norm of N, by that
    recursion; where no bound below one is known, MEASURED takes the norm of every N. Returns the number of steps.
    """
    N, zeta, square = work, work + R * R, work + 2 * R * R
    one, two, three = work + 3 * R * R, work + 4 * R * R, work + 5 * R * R
    steps = 0
    while (e > tolerance) & (steps < 64) | (steps == 0):
        multiply(N, N, square, r, R, T, PRECISION, TO)
        combine(three, 0.5, N, 0.375, square, 0.0, r, R, T, TO)  # T − I
        if steps == 0:
            combine(zeta, 1.0, three, 0.0, three, 0.0, r, R, T, TO)
        else:
            multiply(zeta, three, one, r, R, T, PRECISION, TO)
            combine(three, 1.0, three, 1.0, one, 0.0, r, R, T, TO)
            combine(zeta, 1.0, zeta, 1.0, three, 0.0, r, R, T, TO)
        multiply(square, N, one, r, R, T, PRECISION, TO)  # N³
        combine(two, 0.234375, N, 0.140625, square, 0.0, r, R, T, TO)
        multiply(one, two, three, r, R, T, PRECISION, TO)
        combine(N, 0.625, one, 1.0, three, 0.0, r, R, T, TO)
        e = tl.sqrt(inner(N, N, r, R, T, TO)) if MEASURED else remainder(e)
        steps += 1
    return steps

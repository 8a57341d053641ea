"""From the Gram blocks of each factor the coefficients of its update; ill-conditioned factors are done here and now."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .moves import ADAMW, POLAR
from .rescue import rescue
from .small import add_transposed, combine, inner, inverse_root_series, multiply, sum_into, trace_and_spread
from .sums import solve_in_float64
from .tiles import LEAVE, MOVE, RESCUE, ROW

# Of the Gram matrix of what is retracted: above, float64 and repetition take over (csrc/cpu has the same limit).
CONDITION_LIMIT = 16.0
# Matrices of a program's workspace.
WORKSPACE = 8

_ROW = tl.constexpr(ROW)
_ADAMW = tl.constexpr(ADAMW)
_POLAR = tl.constexpr(POLAR)
_MOVE = tl.constexpr(MOVE)
_LEAVE = tl.constexpr(LEAVE)
_RESCUE = tl.constexpr(RESCUE)
_WORKSPACE = tl.constexpr(WORKSPACE)
_LIMIT = tl.constexpr(CONDITION_LIMIT)


@triton.jit
def gram_less_identity(work, first, count, r, R: tl.constexpr, T: tl.constexpr, P: tl.constexpr, TO: tl.constexpr):
    """E = G − I to matrix 2 and a = symm(YᵀΔ) to matrix 6 of the workspace; returns how much cancelled in G.

    With C = I + c, A = YᵀΔ = a + k, D = ΔᵀΔ and B = I − a, ``G = B C B + B A + AᵀB + D`` is
    ``I + c + D − (a (c + A − a/2) + its transpose) + a c a``: nothing of the size of I is rounded where the step is
    short.
    """
    c, A, E = work, work + R * R, work + 2 * R * R
    one, two, a = work + 3 * R * R, work + 4 * R * R, work + 6 * R * R
    sum_into(c, first, count, 3 * R * R, r, R, T, TO)
    sum_into(A, first + R * R, count, 3 * R * R, r, R, T, TO)
    sum_into(E, first + 2 * R * R, count, 3 * R * R, r, R, T, TO)
    terms, _high, _low = trace_and_spread(E, r, R, T, TO)
    combine(c, 1.0, c, 0.0, c, -1.0, r, R, T, TO)
    add_transposed(a, 0.0, A, 0.5, A, r, R, T)
    combine(one, 1.0, A, -0.5, a, 0.0, r, R, T, TO)
    combine(one, 1.0, one, 1.0, c, 0.0, r, R, T, TO)
    multiply(a, one, two, r, R, T, P, TO)
    combine(E, 1.0, E, 1.0, c, 0.0, r, R, T, TO)
    add_transposed(E, 1.0, E, -1.0, two, r, R, T)
    multiply(a, c, one, r, R, T, P, TO)
    multiply(one, a, two, r, R, T, P, TO)
    combine(E, 1.0, E, 1.0, two, 0.0, r, R, T, TO)
    left, _high, _low = trace_and_spread(E, r, R, T, TO)
    drift = tl.sqrt(inner(c, c, r, R, T, TO))
    # A step along Y cancels in G and leaves the round-off of the terms that cancelled. Q leaves that of Y, from which
    # Y (I − B R) is taken: ‖Y‖₂² ≤ 1 + drift.
    return tl.maximum((terms + r) / (left + r), 1.0) * tl.sqrt(1.0 + drift), drift


@triton.jit
def scale_and_bound(
    work, floor, r, R: tl.constexpr, T: tl.constexpr, P: tl.constexpr, TO: tl.constexpr
):  # fmt: skip
    """c − 1 and a bound on the spectral norm of N = I − (I + E) / c, for E in matrix 2; N to matrix 0.

    Cheapest first: the Frobenius norm at the best c for it; the interval of Gershgorin's discs, which starts no lower
    than 1 + floor, at its centre; and, where both are poor, the fourth root of the norm of N⁴.
    """
    N, E, square, fourth = work, work + 2 * R * R, work + 3 * R * R, work + 4 * R * R
    trace, high, low = trace_and_spread(E, r, R, T, TO)
    norm2 = inner(E, E, r, R, T, TO)
    excess = (trace + norm2) / (trace + r)  # c = ‖G‖² / tr G
    low = tl.maximum(low, floor)
    centre = 0.5 * (high + low)
    half = 0.5 * (high - low) / (1.0 + centre)
    combine(N, -1.0 / (1.0 + excess), E, 0.0, E, excess / (1.0 + excess), r, R, T, TO)
    bound = tl.sqrt(inner(N, N, r, R, T, TO))
    if (bound > 0.5) & (half > 0.5):
        multiply(N, N, square, r, R, T, P, TO)
        multiply(square, square, fourth, r, R, T, P, TO)
        bound = tl.minimum(bound, tl.sqrt(tl.sqrt(tl.sqrt(inner(fourth, fourth, r, R, T, TO)))))
    if half < bound:
        combine(N, -1.0 / (1.0 + centre), E, 0.0, E, centre / (1.0 + centre), r, R, T, TO)
        excess = centre
        bound = half
    return excess, bound * 1.0001 + 1e-7  # the bounds' own round-off


@triton.jit
def solve_kernel(
    table,
    settings,
    partials,
    coefficients,
    scales,
    state,
    refused,
    workspace,
    info,
    factors,
    tolerance,
    KIND: tl.constexpr,
    STEPS: tl.constexpr,
    SHARDED: tl.constexpr,
    ELEMENT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    T64: tl.constexpr,
    ROWS: tl.constexpr,
):
    """For the factors of a program: W and F, scale, state and a row of ``info``.

    Of a factor whose rows others have too, SHARDED, the sums are all there is: nothing else decides anything.

    With R = G^(−1/2) they are B R − I, R − I and 1 where the step is short, else B R, R and 0; of POLAR F alone, with
    R = (I + F) · scale. A program has one workspace and takes every so-many-th factor.
    """
    program = tl.program_id(0)
    work64 = workspace + program.to(tl.int64) * (_WORKSPACE * R * R)
    work = work64.to(tl.pointer_type(TO), bitcast=True)
    for index in range(program, factors, tl.num_programs(0)):
        factor = tl.full((), 0, tl.int64) + index
        header = table + factor * _ROW
        n, r = tl.load(header), tl.load(header + 1).to(tl.int32)
        count = tl.load(header + 3).to(tl.int32)
        proceed = True
        if KIND == _ADAMW:
            proceed = (tl.load(state + factor) == _MOVE) & (tl.load(refused) == 0)
        if proceed:
            first = partials + tl.load(header + 2) * (3 * R * R)
            unit = tl.full((), 1.0, TO)
            if KIND == _POLAR:
                growth = unit
                drift = 0.0 * unit
                sum_into(work, first, count, 3 * R * R, r, R, T, TO)
                trace, _high, _low = trace_and_spread(work, r, R, T, TO)
                unit = trace / r
                in_range = (unit < 1e36) & (unit > 1e-24)
                combine(work + 2 * R * R, 1.0 / unit, work, 0.0, work, -1.0, r, R, T, TO)
            else:
                growth, drift = gram_less_identity(work, first, count, r, R, T, PRECISION, TO)
                in_range = True
            if KIND == _ADAMW:  # far from the manifold a moment may have overflowed: the rescue looks
                in_range = drift <= 3.0
            floor = tl.full((), -1.0, TO) if KIND == _POLAR else -2.0 * drift
            excess, bound = scale_and_bound(work, floor, r, R, T, PRECISION, TO)
            condition = (1.0 + bound) / (1.0 - bound) * growth
            solved = in_range & (bound < 1.0) & (condition <= _LIMIT)
            steps = 0
            residual = tl.full((), 0.0, TO)
            if solved:
                steps = inverse_root_series(work, bound, tolerance, r, R, T, PRECISION, TO, False)
                residual = tl.sqrt(inner(work, work, r, R, T, TO))
                # else the bound did not hold: the factor had drifted far
                solved = residual <= 16.0 * tolerance * tl.sqrt(r.to(TO))
            if solved:
                root = tl.sqrt(1.0 + excess)
                # Round-off of the size of the step where that is short, of the size of the result where it is long.
                short = (KIND == _POLAR) | (excess < 1.0)
                less = tl.where(short, -excess / (root * (1.0 + root)), 1.0 / root)  # 1/root − 1
                W = coefficients + factor * (2 * R * R)
                F = W + R * R
                combine(F, 1.0 / root, work + R * R, 0.0, work + R * R, less, r, R, T, TO)
                if KIND != _POLAR:
                    a = work + 6 * R * R
                    multiply(a, F, work, r, R, T, PRECISION, TO)
                    combine(work, -1.0, work, tl.where(short, -1.0, 0.0), a, 0.0, r, R, T, TO)
                    combine(W, 1.0, work, 1.0, F, 0.0, r, R, T, TO)
                    tl.store(scales + factor, tl.where(short, 1.0, 0.0))
                else:
                    tl.store(scales + factor, 1.0 / tl.sqrt(unit))
                # The residual of Q is that of R G R, and the round-off of the Gram matrix and of the product.
                size = tl.sqrt(r.to(TO))
                off = tolerance * size * (2.0 + 1.25 * size + 8.0 * condition)  # csrc/cpu/stiefel/residual.h
                tl.store(state + factor, _MOVE)
                write_info(info, factor, 0.0, stored_residual(residual + off, n, r, ELEMENT, TO), steps, 0, drift)
            elif SHARDED:
                tl.debug_barrier()
                W = coefficients + factor * (2 * R * R)
                status, error, steps = solve_in_float64(first, W, W + R * R, work64, tolerance, r, R, T, T64, TO)
                tl.store(scales + factor, 0.0)
                tl.store(state + factor, tl.where(status == 0.0, _MOVE, _LEAVE))
                write_info(info, factor, status, stored_residual(error, n, r, ELEMENT, tl.float64), steps, 1, drift)
            else:
                tl.store(state + factor, _LEAVE)
                tl.debug_barrier()
                status, error, steps = rescue(
                    table, factor, settings, work64, KIND, STEPS, ELEMENT, INDEX, R, T64, ROWS
                )
                write_info(info, factor, status, stored_residual(error, n, r, ELEMENT, tl.float64), steps, 1, drift)
        else:  # its row of info is that of the couplings
            tl.debug_barrier()  # every warp has read the state
            tl.store(state + factor, _LEAVE)


@triton.jit
def stored_residual(residual, n, r, ELEMENT: tl.constexpr, TO: tl.constexpr):
    """A bound on ‖QᵀQ − I‖ of what is stored, from that of what is computed in TO.

    Rounding moves each value by at most u |q| + η, Q by d = u ‖Q‖ + η sqrt(n r), QᵀQ by d (2 ‖Q‖₂ + d).
    """
    U: tl.constexpr = (
        0.0 if ELEMENT == TO else 2.0**-24 if tl.float32 == ELEMENT else 2.0**-8 if tl.bfloat16 == ELEMENT else 2.0**-11
    )
    LEAST: tl.constexpr = 2.0**-25 if tl.float16 == ELEMENT else 0.0
    size = tl.sqrt(1.0 + residual)
    moved = U * tl.sqrt(r.to(TO)) * size + LEAST * tl.sqrt(n.to(TO) * r.to(TO))
    return residual + moved * (2.0 * size + moved)


@triton.jit
def write_info(info, factor, status, residual, iterations, path, drift):
    """A row of ``info``: status, residual, iterations, path, drift."""
    tl.store(info + factor * 5, tl.cast(status, tl.float64))
    tl.store(info + factor * 5 + 1, tl.cast(residual, tl.float64))
    tl.store(info + factor * 5 + 2, tl.cast(iterations, tl.float64))
    tl.store(info + factor * 5 + 3, tl.cast(path, tl.float64))
    tl.store(info + factor * 5 + 4, tl.cast(drift, tl.float64))

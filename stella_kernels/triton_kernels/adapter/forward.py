"""The adapter's kernels: rows of activations stream by once, and factors stay where they are used.

T rows; x (T, n), y (T, m), U (m, r), S (r, r) or its diagonal (r,), Vt = Vᵀ (r, n), each read by its strides. The
equations are those of ``reference/adapter.py``. Products take operands of the layer's dtype (OPERAND; DOT is what
``tl.dot`` is given, wider in the interpreter, which has no bfloat16) and sum in TO, float32 or float64. A program is
one of a grid of row chunks and strips of columns: sums over rows are split by chunk and sums over columns by strip,
into partial results that are added in their order, so that every run gives the same bits. Loops over activations are
told STAGES, without which Triton fetches ahead what is multiplied and not what is only added to.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .dropout import kept


@triton.jit
def narrowed(value, OPERAND: tl.constexpr, DOT: tl.constexpr, TO: tl.constexpr):
    """``value`` rounded to OPERAND, as ``tl.dot`` takes it; by way of TO: none narrows 64 bits to 16 in one step."""
    return value.to(TO).to(OPERAND).to(DOT)


@triton.jit
def rounded(value, PRECISION: tl.constexpr):
    """An operand of a product in PRECISION: of 'tf32' to the nearest, where tensor cores cut off 13 bits."""
    if PRECISION == "tf32":
        bits = value.to(tl.int32, bitcast=True)
        near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        value = tl.where(value - value == 0.0, near, value)  # not NaN, whose bits might become those of a number
    return value


@triton.jit
def load_core(S, row, column, r, R: tl.constexpr, TO: tl.constexpr, DIAGONAL: tl.constexpr):
    """S (R, R), zero outside (r, r); of a diagonal S its (1, R) row."""
    i = tl.arange(0, R)
    if DIAGONAL:
        core = tl.load(S + i * row, mask=i < r, other=0.0).to(TO)[None, :]
    else:
        mask = (i < r)[:, None] & (i < r)[None, :]
        core = tl.load(S + i[:, None] * row + i[None, :] * column, mask=mask, other=0.0).to(TO)
    return core


@triton.jit
def store_projection(
    value, S, A, P, start, rows, left, r, s_row, s_column,
    OPERAND: tl.constexpr, TO: tl.constexpr, PRECISION: tl.constexpr, DIAGONAL: tl.constexpr, R: tl.constexpr,
    KEEP: tl.constexpr = True
):  # fmt: skip
    """Rows of A, rounded to OPERAND and stored with KEEP, and of P = A Sᵀ."""
    i = tl.arange(0, R)
    at = start * r + rows[:, None] * r + i[None, :]
    mask = (rows < left)[:, None] & (i < r)[None, :]
    narrow = value.to(OPERAND)
    if KEEP:
        tl.store(A + at, narrow, mask=mask)
    core = load_core(S, s_row, s_column, r, R, TO, DIAGONAL)
    if DIAGONAL:
        product = narrow.to(TO) * core
    else:  # a half type is a tf32 as it is
        core = rounded(core, PRECISION)
        product = tl.dot(narrow.to(TO), tl.trans(core), input_precision=PRECISION, out_dtype=TO)
    tl.store(P + at, product.to(OPERAND), mask=mask)


@triton.jit(do_not_specialize=["T", "threshold"])
def project_kernel(
    x,
    Vt,
    S,
    A,
    P,
    partials,
    seed,
    T,
    n,
    r,
    width,
    x_row,
    x_column,
    v_row,
    v_column,
    s_row,
    s_column,
    threshold,
    inverse: tl.float64,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE: tl.constexpr,
    INDEX: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROPS_ALL: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS rows of A = d(x) V and P = A Sᵀ; with SPLIT, of d(x) V over ``width`` columns, to ``partials`` (·, T, r)."""
    blocks = tl.cdiv(T, ROWS)
    start = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    strip = tl.program_id(0) // blocks
    rows = tl.arange(0, ROWS)
    ranks = tl.arange(0, R)
    left = tl.minimum(T - start, ROWS).to(tl.int32)
    x += start * x_row
    total = tl.zeros((ROWS, R), dtype=TO)
    for first in tl.range(strip * width, tl.minimum(strip * width + width, n), COLUMNS, num_stages=STAGES):
        columns = first + tl.arange(0, COLUMNS)
        mask = (rows < left)[:, None] & (columns < n)[None, :]
        at = (rows.to(INDEX) * x_row)[:, None] + (columns.to(INDEX) * x_column)[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0)  # (ROWS, COLUMNS)
        if DROPOUT:
            keep = kept(seed, threshold, start, first, DROPS_ALL, ROWS, COLUMNS)
            tile = tl.where(keep, tile, 0.0)
        at = (ranks.to(INDEX) * v_row)[:, None] + (columns.to(INDEX) * v_column)[None, :]
        V = tl.load(Vt + at, mask=(ranks < r)[:, None] & (columns < n)[None, :], other=0.0)  # (R, COLUMNS)
        total = tl.dot(
            narrowed(tile, OPERAND, DOT, TO),
            tl.trans(narrowed(V, OPERAND, DOT, TO)),
            total,
            input_precision=PRECISION,
            out_dtype=TO,
        )
    if DROPOUT:
        total *= tl.full((1, 1), inverse, TO)
    if SPLIT:
        at = (strip.to(tl.int64) * T + start) * r + rows[:, None] * r + ranks[None, :]
        tl.store(partials + at, total, mask=(rows < left)[:, None] & (ranks < r)[None, :])
    else:
        store_projection(total, S, A, P, start, rows, left, r, s_row, s_column, OPERAND, TO, CORE, DIAGONAL, R)


@triton.jit
def load_sum(partials, splits, start, rows, left, T, r, R: tl.constexpr, TO: tl.constexpr):
    """Rows of the sum of ``splits`` matrices (T, r), in their order, zero outside."""
    ranks = tl.arange(0, R)
    mask = (rows < left)[:, None] & (ranks < r)[None, :]
    at = start * r + rows[:, None] * r + ranks[None, :]
    step = (start * 0 + T) * r  # in 64 bits
    total = tl.zeros((rows.shape[0], R), dtype=TO)
    for _ in range(splits):
        total += tl.load(partials + at, mask=mask, other=0.0).to(TO)
        at += step
    return total


@triton.jit(do_not_specialize=["T", "splits"])
def core_kernel(
    partials,
    S,
    A,
    P,
    T,
    r,
    splits,
    s_row,
    s_column,
    scale: tl.float64,
    OPERAND: tl.constexpr,
    TO: tl.constexpr,
    CORE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    KEEP: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of A, ``scale`` times the sum of ``partials`` (splits, T, r), and of P = A Sᵀ; without KEEP P alone."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    left = tl.minimum(T - start, ROWS).to(tl.int32)
    total = tl.full((1, 1), scale, TO) * load_sum(partials, splits, start, rows, left, T, r, R, TO)
    store_projection(total, S, A, P, start, rows, left, r, s_row, s_column, OPERAND, TO, CORE, DIAGONAL, R, KEEP)


@triton.jit(do_not_specialize=["T"])
def accumulate_kernel(
    y,
    bias,
    P,
    U,
    T,
    m,
    r,
    chunk,
    y_row,
    y_column,
    bias_step,
    u_row,
    u_column,
    scale: tl.float64,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    READ: tl.constexpr,
    BIAS: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """COLUMNS columns of ``chunk`` rows of y + s P Uᵀ; without READ, of b + s P Uᵀ, b = 0 without BIAS."""
    strips = tl.cdiv(m, COLUMNS)
    start = (tl.program_id(0) // strips).to(tl.int64) * chunk
    columns = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    left = tl.minimum(T - start, chunk).to(tl.int32)
    y += start * y_row
    P += start * r
    place = (columns.to(INDEX) * u_row)[:, None] + (ranks.to(INDEX) * u_column)[None, :]
    factor = tl.load(U + place, mask=(columns < m)[:, None] & (ranks < r)[None, :], other=0.0)  # (COLUMNS, R)
    factor = tl.trans(narrowed(factor, OPERAND, DOT, TO))
    s = tl.full((1, 1), scale, TO)
    for block in tl.range(0, left, ROWS, num_stages=STAGES):
        rows = block + tl.arange(0, ROWS)
        mask = (rows < left)[:, None] & (ranks < r)[None, :]
        p = tl.load(P + rows[:, None] * r + ranks[None, :], mask=mask, other=0.0)  # (ROWS, R)
        value = s * tl.dot(narrowed(p, OPERAND, DOT, TO), factor, input_precision=PRECISION, out_dtype=TO)
        mask = (rows < left)[:, None] & (columns < m)[None, :]
        at = (rows.to(INDEX) * y_row)[:, None] + (columns.to(INDEX) * y_column)[None, :]
        if READ:
            value += tl.load(y + at, mask=mask, other=0.0).to(TO)
        if BIAS:
            value += tl.load(bias + columns * bias_step, mask=columns < m, other=0.0).to(TO)[None, :]
        tl.store(y + at, value.to(OPERAND), mask=mask)

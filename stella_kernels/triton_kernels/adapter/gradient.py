"""The kernels of the adapter's backward pass: x is read once, and Y' too at ranks where registers hold all that it is
for (``joins_contractions``). See ``forward.py``."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .dropout import kept
from .forward import load_core, load_sum, narrowed, rounded


@triton.jit(do_not_specialize=["T"])
def contract_kernel(
    grad_y,
    P,
    U,
    partial_Q,
    partial_U,
    T,
    m,
    r,
    chunk,
    y_row,
    y_column,
    u_row,
    u_column,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_U: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of COLUMNS columns of ``chunk`` rows of Y', read once: Y' U to ``partial_Q`` (strips, T, r) and Y'ᵀ P to
    ``partial_U`` (chunks, m, r)."""
    strips = tl.maximum(tl.cdiv(m, COLUMNS), 1)  # of a layer without outputs: one, of zeros
    part = tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    start = part.to(tl.int64) * chunk
    columns = strip * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    left = tl.minimum(T - start, chunk).to(tl.int32)
    grad_y += start * y_row
    P += start * r
    partial_Q += (strip.to(tl.int64) * T + start) * r
    outside = (columns < m)[:, None] & (ranks < r)[None, :]
    if NEED_Q:
        place = (columns.to(INDEX) * u_row)[:, None] + (ranks.to(INDEX) * u_column)[None, :]
        factor = narrowed(tl.load(U + place, mask=outside, other=0.0), OPERAND, DOT, TO)  # (COLUMNS, R)
    total = tl.zeros((R, COLUMNS), dtype=TO)
    for block in tl.range(0, left, ROWS, num_stages=STAGES):
        rows = block + tl.arange(0, ROWS)
        mask = (rows < left)[:, None] & (columns < m)[None, :]
        at = (rows.to(INDEX) * y_row)[:, None] + (columns.to(INDEX) * y_column)[None, :]
        tile = narrowed(tl.load(grad_y + at, mask=mask, other=0.0), OPERAND, DOT, TO)  # (ROWS, COLUMNS)
        mask = (rows < left)[:, None] & (ranks < r)[None, :]
        at = rows[:, None] * r + ranks[None, :]
        if NEED_Q:
            q = tl.dot(tile, factor, input_precision=PRECISION, out_dtype=TO)  # (ROWS, R)
            tl.store(partial_Q + at, q, mask=mask)
        if NEED_U:
            p = narrowed(tl.load(P + at, mask=mask, other=0.0), OPERAND, DOT, TO)  # (ROWS, R)
            # as (R, COLUMNS): a tile that is also read transposed is not fetched ahead before sm_90
            total = tl.dot(tl.trans(p), tile, total, input_precision=PRECISION, out_dtype=TO)
    if NEED_U:
        at = (part.to(tl.int64) * m + columns)[:, None] * r + ranks[None, :]
        tl.store(partial_U + at, tl.trans(total), mask=outside)


@triton.jit(do_not_specialize=["T", "splits"])
def core_gradient_kernel(
    partials,
    A,
    S,
    K,
    partial_S,
    T,
    r,
    splits,
    chunk,
    s_row,
    s_column,
    scale: tl.float64,
    OPERAND: tl.constexpr,
    TO: tl.constexpr,
    CORE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    NEED_S: tl.constexpr,
    NEED_K: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of ``chunk`` rows: Q = s times the sum of ``partials`` (splits, T, r), K = Q S, and Qᵀ A, or its diagonal, to
    ``partial_S`` (chunks, r, r) or (chunks, r)."""
    part = tl.program_id(0)
    start = part.to(tl.int64) * chunk
    ranks = tl.arange(0, R)
    left = tl.minimum(T - start, chunk).to(tl.int32)
    s = tl.full((1, 1), scale, TO)
    core = load_core(S, s_row, s_column, r, R, TO, DIAGONAL)
    if not DIAGONAL:
        core = rounded(core, CORE)
    total = tl.zeros((1, R) if DIAGONAL else (R, R), dtype=TO)
    for block in range(0, left, ROWS):
        rows = block + tl.arange(0, ROWS)
        mask = (rows < left)[:, None] & (ranks < r)[None, :]
        at = start * r + rows[:, None] * r + ranks[None, :]
        Q = s * load_sum(partials, splits, start, rows, left, T, r, R, TO)  # (ROWS, R)
        if not DIAGONAL:
            operand = rounded(Q, CORE)
        if NEED_K:
            product = Q * core if DIAGONAL else tl.dot(operand, core, input_precision=CORE, out_dtype=TO)
            tl.store(K + at, product.to(OPERAND), mask=mask)
        if NEED_S:
            a = tl.load(A + at, mask=mask, other=0.0).to(TO)  # (ROWS, R)
            if DIAGONAL:
                total += tl.sum(Q * a, axis=0)[None, :]
            else:
                total = tl.dot(tl.trans(operand), a, total, input_precision=CORE, out_dtype=TO)
    if NEED_S:
        if DIAGONAL:
            tl.store(partial_S + part * r + ranks[None, :], total, mask=(ranks < r)[None, :])
        else:
            at = part * r * r + ranks[:, None] * r + ranks[None, :]
            tl.store(partial_S + at, total, mask=(ranks < r)[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=["T", "threshold"])
def spread_kernel(
    x,
    K,
    Vt,
    grad_x,
    partial_V,
    seed,
    T,
    n,
    r,
    chunk,
    x_row,
    x_column,
    v_row,
    v_column,
    g_row,
    g_column,
    threshold,
    inverse: tl.float64,
    beta: tl.float64,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    TO: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROPS_ALL: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_V: tl.constexpr,
    READ: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of COLUMNS columns of ``chunk`` rows: β ∂x + dᵀ(K Vᵀ) in place, and Kᵀ d(x) to ``partial_V`` (chunks, r, n).

    x is read once, and one mask serves both.
    """
    strips = tl.cdiv(n, COLUMNS)
    part = tl.program_id(0) // strips
    first = tl.program_id(0) % strips * COLUMNS
    start = part.to(tl.int64) * chunk
    columns = first + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    left = tl.minimum(T - start, chunk).to(tl.int32)
    x += start * x_row
    grad_x += start * g_row
    K += start * r
    inside = (ranks < r)[:, None] & (columns < n)[None, :]
    gain = tl.full((1, 1), inverse, TO)
    if NEED_X:
        place = (ranks.to(INDEX) * v_row)[:, None] + (columns.to(INDEX) * v_column)[None, :]
        factor = narrowed(tl.load(Vt + place, mask=inside, other=0.0), OPERAND, DOT, TO)  # (R, COLUMNS)
    total = tl.zeros((R, COLUMNS), dtype=TO)
    for block in tl.range(0, left, ROWS, num_stages=STAGES):
        rows = block + tl.arange(0, ROWS)
        mask = (rows < left)[:, None] & (ranks < r)[None, :]
        k = narrowed(tl.load(K + rows[:, None] * r + ranks[None, :], mask=mask, other=0.0), OPERAND, DOT, TO)
        mask = (rows < left)[:, None] & (columns < n)[None, :]
        if DROPOUT:
            keep = kept(seed, threshold, start + block, first, DROPS_ALL, ROWS, COLUMNS)
        if NEED_V:
            at = (rows.to(INDEX) * x_row)[:, None] + (columns.to(INDEX) * x_column)[None, :]
            tile = tl.load(x + at, mask=mask, other=0.0)  # (ROWS, COLUMNS)
            if DROPOUT:
                tile = tl.where(keep, tile, 0.0)
            tile = narrowed(tile, OPERAND, DOT, TO)
            total = tl.dot(tl.trans(k), tile, total, input_precision=PRECISION, out_dtype=TO)
        if NEED_X:
            value = tl.dot(k, factor, input_precision=PRECISION, out_dtype=TO)  # (ROWS, COLUMNS)
            if DROPOUT:
                value = tl.where(keep, value * gain, 0.0)
            at = (rows.to(INDEX) * g_row)[:, None] + (columns.to(INDEX) * g_column)[None, :]
            if READ:
                value += tl.full((1, 1), beta, TO) * tl.load(grad_x + at, mask=mask, other=0.0).to(TO)
            tl.store(grad_x + at, value.to(OPERAND), mask=mask)
    if NEED_V:
        if DROPOUT:
            total *= gain
        at = (part.to(tl.int64) * r + ranks)[:, None] * n + columns[None, :]
        tl.store(partial_V + at, total, mask=inside)


@triton.jit(do_not_specialize=["chunks_U", "chunks_V", "chunks_S"])
def sum_kernel(
    partial_U,
    grad_U,
    size_U,
    chunks_U,
    scale: tl.float64,
    partial_V,
    grad_V,
    size_V,
    chunks_V,
    partial_S,
    grad_S,
    size_S,
    chunks_S,
    TO: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Sums of partial gradients (chunks, size) in their order: s times that of U, then those of V and of S."""
    blocks_U = tl.cdiv(size_U, ITEMS)
    blocks_V = tl.cdiv(size_V, ITEMS)
    program = tl.program_id(0)
    if program < blocks_U:
        store_sum(partial_U, grad_U, size_U, chunks_U, program, tl.full((1,), scale, TO), TO, ITEMS)
    elif program < blocks_U + blocks_V:
        store_sum(partial_V, grad_V, size_V, chunks_V, program - blocks_U, tl.full((1,), 1.0, TO), TO, ITEMS)
    else:
        block = program - blocks_U - blocks_V
        store_sum(partial_S, grad_S, size_S, chunks_S, block, tl.full((1,), 1.0, TO), TO, ITEMS)


@triton.jit
def store_sum(partials, out, size, chunks, block, scale, TO: tl.constexpr, ITEMS: tl.constexpr):
    items = block.to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    mask = items < size
    total = tl.zeros((ITEMS,), dtype=TO)
    at = items
    for _ in range(chunks):
        total += tl.load(partials + at, mask=mask, other=0.0)
        at += size
    tl.store(out + items, (scale * total).to(TO).to(out.dtype.element_ty), mask=mask)

"""The dropout of ``reference/philox.py`` inside a kernel: the same words, hence the same mask, for the same seed."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, threshold, start, rows, first, n, DROPS_ALL: tl.constexpr, QUADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of rows ``start + rows`` and columns [first, first + COLUMNS) of (T, n) are kept.

    With QUADS, n is a multiple of 4: a row starts with a new block of words, and none is generated twice.
    """
    key = tl.load(seed)
    row = start + rows.to(tl.int64)
    if QUADS:
        quads = first // 4 + tl.arange(0, COLUMNS // 4)
        block = row[:, None] * (n // 4) + quads[None, :]
    else:
        columns = first + tl.arange(0, COLUMNS)
        element = row[:, None] * n + columns[None, :]
        block = element >> 2
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, low * 0, low * 0)
    if QUADS:
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        word = (element & 3).to(tl.int32)
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    if DROPS_ALL:
        return words != words
    return words >= threshold.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["T", "threshold"])
def dropout_kernel(
    x,
    out,
    seed,
    T,
    n,
    x_row,
    x_column,
    threshold,
    inverse: tl.float64,
    TO: tl.constexpr,
    DROPS_ALL: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of ``out`` (T, n), contiguous: x / (1 - p) where kept, else 0."""
    strips = tl.cdiv(n, COLUMNS)
    start = (tl.program_id(0) // strips).to(tl.int64) * ROWS
    first = tl.program_id(0) % strips * COLUMNS
    rows = tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    mask = (rows < tl.minimum(T - start, ROWS))[:, None] & (columns < n)[None, :]
    row = start + rows.to(tl.int64)
    tile = tl.load(x + (row * x_row)[:, None] + (columns.to(tl.int64) * x_column)[None, :], mask=mask, other=0.0)
    keep = kept(seed, threshold, start, rows, first, n, DROPS_ALL, QUADS, COLUMNS)
    value = tl.where(keep, tile.to(TO) * tl.full((1, 1), inverse, TO), 0.0)
    tl.store(out + (row * n)[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=mask)

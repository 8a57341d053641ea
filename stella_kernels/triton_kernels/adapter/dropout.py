"""The dropout of ``reference/philox.py`` inside a kernel: the same numbers, hence the same mask, for the same seed."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(7)


@triton.jit
def kept(seed, threshold, start, first, DROPS_ALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of rows [start, start + ROWS) and columns [first, first + COLUMNS) are kept.

    ``start`` and ``first`` are multiples of ROWS and COLUMNS, and ``threshold`` is in the upper half of its 32 bits.
    Until a round mixes them, what all rows or all columns share is computed once.
    """
    key = tl.load(seed)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0 = (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]  # the interpreter's loops count in Python
    c1 = (start.to(tl.uint32) + tl.arange(0, ROWS).to(tl.uint32))[:, None]
    c2 = (start >> 32).to(tl.uint32)
    c3 = c2 * 0
    for _ in tl.static_range(_ROUNDS):
        first_high, first_low = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        second_high, second_low = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1 = second_high ^ (c1 ^ k0), second_low
        c2, c3 = first_high ^ (c3 ^ k1), first_low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    words = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    numbers = tl.interleave(words << 16, words)  # 16 bits each, in the upper half
    if DROPS_ALL:
        return numbers != numbers
    return numbers >= threshold.to(tl.uint32, bitcast=True)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of ``out`` (T, n), contiguous: x times ``inverse`` where kept, else 0."""
    strips = tl.cdiv(n, COLUMNS)
    start = (tl.program_id(0) // strips).to(tl.int64) * ROWS
    first = tl.program_id(0) % strips * COLUMNS
    rows = tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    mask = (rows < tl.minimum(T - start, ROWS))[:, None] & (columns < n)[None, :]
    row = start + rows.to(tl.int64)
    tile = tl.load(x + (row * x_row)[:, None] + (columns.to(tl.int64) * x_column)[None, :], mask=mask, other=0.0)
    keep = kept(seed, threshold, start, first, DROPS_ALL, ROWS, COLUMNS)
    value = tl.where(keep, tile.to(TO) * tl.full((1, 1), inverse, TO), 0.0)
    tl.store(out + (row * n)[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=mask)

"""Kernels with faults, of Triton's language."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def over_read(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), mask=at < n)


@triton.jit
def _header(table):
    return tl.load(table).to(tl.int32), tl.load(table + 1)


@triton.jit
def hint_on_a_helper_s_result(table, x, BLOCK: tl.constexpr):
    """The hint is true of ``begin``; Triton 3.9 believes it of ``n`` as well, and asks a mask once for four columns."""
    n, begin = _header(table)
    begin = tl.multiple_of(begin, 2048)
    at = tl.arange(0, BLOCK)
    tl.store(x + begin + at, 1.0, mask=at < n)


@triton.jit
def every_program_writes_the_same_place(x):
    tl.store(x, tl.program_id(0).to(tl.float32))


@triton.jit
def sum_of(x, y, n, BLOCK: tl.constexpr):
    """No fault: partial sums of the warps through shared memory, the hint where it is true."""
    at = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + at, mask=at < n, other=0.0)))

"""What the compiler is told of a value holds of that value alone.

``tl.multiple_of`` and its kin mark the operation that made the value. A call of a helper makes all of the helper's
results: some Tritons spread the mark to each of them (3.9), others lose it (3.5 to 3.8).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from tests.triton_kernels.launches import program

MARK = re.compile(r"tt\.(?:divisibility|contiguity|constancy)")


def marked_calls(text: str) -> Iterator[str]:
    """Operations with a mark that are calls, or have several results for one mark."""
    for line in text.splitlines():
        made = re.match(r"\s*(?P<results>%\S+) = (?P<operation>\S+) ", line)
        if made and MARK.search(line) and (made["operation"] == "tt.call" or ":" in made["results"]):
            yield line.strip()


@triton.jit
def header(p):
    return tl.load(p).to(tl.int32), tl.load(p + 1)


@triton.jit
def spread_kernel(p, x):
    r, begin = header(p)
    begin = tl.multiple_of(begin, 2048)
    columns = tl.arange(0, 512)
    tl.store(x + begin + columns, 1.0, mask=columns < r)


@triton.jit
def own_kernel(p, x):
    r, begin = header(p)
    columns = tl.multiple_of(begin * 2048, 2048) + tl.arange(0, 512)
    tl.store(x + columns, 1.0, mask=columns < r)


def test_a_mark_on_what_a_helper_returned_is_seen() -> None:
    types = {"p": "*i64", "x": "*fp32"}
    assert len(list(marked_calls(program(spread_kernel, types, {}, 4, 80)))) == 1
    honest = program(own_kernel, types, {}, 4, 80)
    assert MARK.search(honest)
    assert not list(marked_calls(honest))


@pytest.mark.parametrize("R", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_kernel_marks_what_a_helper_returned(R: int, dtype: torch.dtype) -> None:
    from stella_kernels.triton_kernels.report.adapter_variants import adapter_variants
    from stella_kernels.triton_kernels.report.variants import stiefel_variants

    kernels = set()
    for variant in (*stiefel_variants(R, dtype), *adapter_variants(R, dtype, "cuda")):
        if variant.kernel.fn.__name__ == "solve_kernel" and R > 16:
            continue  # its source is the same at every rank, and long
        text = program(variant.kernel, variant.signature(), variant.constants, variant.warps, 80)
        assert not list(marked_calls(text)), variant.name
        kernels.add(variant.kernel.fn.__name__)
    assert len(kernels) >= 9

"""Where tensors lie, against every element's address one by one."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stella_kernels.operators.memory import first_shared, meet, overlaps_itself

sizes = st.lists(st.integers(1, 4), min_size=2, max_size=2)
strides = st.lists(st.integers(0, 6), min_size=2, max_size=2)
views = st.tuples(sizes, strides, st.integers(0, 9))

BUFFER = torch.zeros(64)


def view(of: tuple[list[int], list[int], int]) -> Tensor:
    return BUFFER.as_strided(*of)


def addresses(t: Tensor) -> list[int]:
    """Of every byte of every element."""
    indices = itertools.product(*map(range, t.shape))
    return [
        t.data_ptr() + t.element_size() * sum(i * s for i, s in zip(index, t.stride(), strict=True)) + byte
        for index in indices
        for byte in range(t.element_size())
    ]


@settings(max_examples=300, deadline=None)
@given(views)
def test_overlap_of_a_matrix_with_itself(of: tuple[list[int], list[int], int]) -> None:
    found = addresses(view(of))
    assert overlaps_itself(view(of)) == (len(set(found)) < len(found))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5)), min_size=3, max_size=3))
def test_overlap_of_more_dimensions(sides: list[tuple[int, int]]) -> None:
    t = BUFFER.as_strided([size for size, _ in sides], [stride for _, stride in sides])
    found = addresses(t)
    assert overlaps_itself(t) == (len(set(found)) < len(found))


@settings(max_examples=300, deadline=None)
@given(views, views, st.booleans(), st.booleans())
def test_two_matrices_meet(
    one: tuple[list[int], list[int], int], other: tuple[list[int], list[int], int], alike: bool, narrow: bool
) -> None:
    """Of the same strides or not, of the same dtype or not."""
    a = view(one)
    b = BUFFER.as_strided(other[0], one[1] if alike else other[1], other[2])
    if narrow:
        b = BUFFER.view(torch.bfloat16).as_strided(b.shape, b.stride(), 2 * other[2] + 1)
    wanted = bool(set(addresses(a)) & set(addresses(b)))
    assert meet(a, b) == wanted
    assert first_shared([a, b], [False, True]) == ((1, 0) if wanted else None)
    assert first_shared([a, b], [False, False]) is None


def test_many_slices_of_one_buffer_do_not_meet() -> None:
    buffer = torch.zeros(50, 12)
    columns = [buffer[:, i : i + 3] for i in range(0, 12, 3)]
    rows = [buffer[:25], buffer[25:]]
    assert first_shared(columns, [True] * 4) is None
    assert first_shared(rows, [True] * 2) is None
    assert first_shared([*columns, rows[1]], [True, False, False, False, False]) == (0, 4)

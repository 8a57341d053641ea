"""Where tensors lie: whether they have memory, elements of one share a place, or two share some. Exact, by strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def has_memory(t: Tensor) -> bool:
    """Whether a tensor's storage holds all its elements: engines that offload resize it, under the tensor.

    Reading one that is too short ends the process.
    """
    if t.layout is not torch.strided or t.is_meta or t.numel() == 0:
        return True
    return t.untyped_storage().nbytes() >= (t.storage_offset() + extent(t)) * t.element_size()


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of a dense tensor lie in one place."""
    if t.is_contiguous():
        return False
    sides = [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
    if t.numel() == 0 or not sides:
        return False
    if any(stride == 0 for stride, _ in sides):
        return True
    if len(sides) == 2:
        # i s = j t for some |i| < n, |j| < r not both zero: the smallest such are strides over their gcd
        (s, n), (other, r) = sides
        common = math.gcd(s, other)
        return other // common < n and s // common < r
    reach = 0  # of the sides with smaller strides: a stride beyond it starts anew
    for stride, size in sorted(sides):
        if stride <= reach:
            return bool((_marks(t, extent(t)) > 1).any())
        reach += stride * (size - 1)
    return False


def first_shared(tensors: Sequence[Tensor], written: Sequence[bool]) -> tuple[int, int] | None:
    """Places of a tensor that is written and another that has some of its memory; none is empty."""
    spans = sorted((t.data_ptr(), t.data_ptr() + extent(t) * t.element_size(), i) for i, t in enumerate(tensors))
    for place, (_, end, i) in enumerate(spans):
        for begin, _, j in spans[place + 1 :]:
            if begin >= end:
                break
            if not (written[i] or written[j]) or tensors[i].device != tensors[j].device:
                continue
            if meet(tensors[i], tensors[j]):
                return (i, j) if written[i] else (j, i)
    return None


def extent(t: Tensor) -> int:
    """Elements from the first to the last, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _marks(t: Tensor, extent: int) -> Tensor:
    """How many elements of ``t`` lie in each of the places from its first on: (extent,) on the CPU."""
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    return torch.bincount(places.flatten(), minlength=extent)


def meet(a: Tensor, b: Tensor) -> bool:
    """Whether an element lies in both, given that their extents do: columns of one buffer, for example, do not meet."""
    apart, rest = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    same = (a.element_size(), a.dim(), a.stride()) == (b.element_size(), 2, b.stride())
    if same and rest == 0 and min(a.stride()) > 0:
        return _matrices_meet(a, b, apart)
    begin = min(a.data_ptr(), b.data_ptr())
    end = max(t.data_ptr() + extent(t) * t.element_size() for t in (a, b))
    return bool((_bytes(a, begin, end) & _bytes(b, begin, end)).any())


def _matrices_meet(a: Tensor, b: Tensor, apart: int) -> bool:
    """i far + j near = apart, with i and j differences of the two's indices, near the smaller stride."""
    (near, near_a, near_b), (far, far_a, far_b) = sorted(zip(a.stride(), a.shape, b.shape, strict=True))
    reach = max(near_a, near_b) * near
    for i in range(max(1 - far_b, (apart - reach) // far), min(far_a - 1, (apart + reach) // far + 1) + 1):
        j, rest = divmod(apart - i * far, near)
        if rest == 0 and -near_b < j < near_a:
            return True
    return False


def _bytes(t: Tensor, begin: int, end: int) -> Tensor:
    """Which bytes between two addresses ``t`` takes."""
    taken = (_marks(t, extent(t)) > 0).repeat_interleave(t.element_size())
    everywhere = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    everywhere[t.data_ptr() - begin :][: len(taken)] = taken
    return everywhere

"""Tensors in memory of exactly their extent: what is read past their end is past the allocation's, and is reported.

Between their rows and columns is NaN of a pattern that must still be there afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def bits(t: Tensor) -> Tensor:
    """The memory of a contiguous tensor as integers, in which NaN equals itself."""
    return t.view(_BITS[t.element_size()])


@dataclass
class Held:
    """A tensor, the memory that it is a view of, and what that held before the call."""

    view: Tensor
    memory: Tensor
    before: Tensor
    written: bool = False

    def touched(self) -> str:
        """What was written that should not have been; empty where nothing was."""
        now, then = self.memory.clone(), self.before.clone()
        if self.written:
            for memory in (now, then):
                memory.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).zero_()
        changed = (bits(now) != bits(then)).nonzero().flatten().tolist()
        return f"elements {changed[:4]} of its memory were written" if changed else ""

    def unchanged(self) -> bool:
        return torch.equal(bits(self.memory), bits(self.before))


def _strides(random: Random, shape: tuple[int, ...], expanded: bool) -> list[int]:
    """Dimensions in a random order of nesting, innermost last two mostly, with gaps or without."""
    order = list(range(len(shape)))
    if len(shape) >= 2 and random.random() < 0.4:
        order[-1], order[-2] = order[-2], order[-1]
    if len(shape) >= 3 and random.random() < 0.2:
        random.shuffle(order)
    gaps = random.random() < 0.35
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        if gaps:
            step = step * random.choice((1, 1, 2, 3)) + random.choice((0, 0, 1, 5, 16))
        strides[d] = step
        step *= max(shape[d], 1)
    if expanded and shape and random.random() < 0.1:
        strides[random.randrange(len(shape))] = 0
    return strides


def hold(random: Random, value: Tensor, written: bool = False) -> Held:
    """``value`` in memory that begins anywhere and ends with it; what is only read may be expanded."""
    shape = tuple(value.shape)
    strides = _strides(random, shape, expanded=not written)
    offset = random.choice((0, 0, 0, 1, 2, 3, 4, 8, 17))
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    length = offset + (extent if value.numel() else 0)
    memory = torch.empty(length, dtype=value.dtype)
    memory.fill_(torch.nan if value.dtype.is_floating_point else -77)
    view = memory.as_strided(shape, strides, offset)
    if 0 in strides and value.numel():
        first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
        memory.as_strided(
            tuple(1 if s == 0 else n for n, s in zip(shape, strides, strict=True)), strides, offset
        ).copy_(value[first])
    else:
        view.copy_(value)
    return Held(view, memory, memory.clone(), written)


def sizes_around(random: Random, largest: int) -> int:
    """Small, odd, around the widths of vectors, register tiles, chunks and blocks."""
    near = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 480, 512, 960, 1024, 2048, 4096, 8192)
    kind = random.random()
    if kind < 0.3:
        return min(largest, random.randint(1, 20))
    if kind < 0.8:
        fitting = [n for n in near if n <= largest]
        return max(1, min(largest, random.choice(fitting) + random.choice((-1, 0, 0, 1, 5))))
    return random.randint(1, largest)


def values(random: Random, shape: tuple[int, ...], dtype: torch.dtype, kind: str, generator: torch.Generator) -> Tensor:
    """Gaussian, but for what ``kind`` says: float64, to be rounded to ``dtype``."""
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    finite = torch.finfo(dtype)
    if kind == "huge":
        value *= finite.max / 8
    elif kind == "tiny":
        value *= finite.tiny * 0.1
    elif kind == "wide":  # every magnitude that there is
        exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        value *= torch.pow(torch.tensor(min(finite.max, 1e300), dtype=torch.float64), exponent)
    elif kind == "zero":
        value.zero_()
    elif kind == "constant":
        value.fill_(random.choice((1.0, -3.0, finite.max, finite.tiny)))
    elif kind == "repeated" and len(shape) > 1:  # columns that are the same
        value[..., :] = value[..., :1]
    elif kind == "not finite" and value.numel():
        flat = value.view(-1)
        for _ in range(random.choice((1, 1, 3))):
            flat[random.choice((0, -1, random.randrange(len(flat))))] = random.choice(
                (torch.nan, torch.inf, -torch.inf)
            )
    return value.clamp(-finite.max, finite.max) if kind != "not finite" else value


KINDS = ("gaussian",) * 6 + ("huge", "tiny", "wide", "zero", "constant", "repeated", "not finite", "not finite")
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_RANKS = (8,) * 6 + (33,) * 3 + (130,)  # a Jacobi SVD of rank 130 takes a second under sanitizers

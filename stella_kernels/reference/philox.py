"""Philox-4x32-7, the counter-based random generator behind dropout, and the dropout defined on it.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), whose table 2 has seven
rounds as the fewest that pass BigCrush; the words are those of Random123's ``philox4x32_R(7)``.

Layout, the same on every backend: of x (..., n), seen as rows of n columns, the element at (row, column) takes 16 of
the 128 bits of the block whose counter is (column // 8, low and high 32 bits of the row, 0) under the key (low, high 32
bits of the int64 seed): of word column % 8 // 2 the low half where the column is even, else the high half. It is kept
where that number is at least round(p * 2**16), at most 2**16 - 1 for p < 1: an integer comparison, so the mask depends
on neither the dtype nor the device nor the number of threads. What is kept is scaled by the reciprocal of the
probability that it is, a multiple of 2**-16 and within 2**-17 of 1 - p, so that the mean of the dropout is x exactly; a
p below 2**-17 drops nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_ELEMENTS = 8  # of a block
_LEVELS = 1 << 16
_CHUNK = 1 << 13  # blocks at a time: temporaries stay in cache and below the size that is split over threads


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for each counter: int64 tensors of one shape that hold unsigned 32-bit values, as they come in.

    One round maps (c0, c1, c2, c3) to (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)); the key moves
    on by the Weyl constants after each of the seven rounds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so shifting and masking gives both halves of the unsigned product
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _MASK) ^ c1 ^ k0, second & _MASK
        c2, c3 = ((first >> 32) & _MASK) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def random_numbers(row: Tensor, block: Tensor, seed: Tensor) -> Tensor:
    """The eight numbers of blocks (row, block), int64 of one shape: (*shape, 8) int64 from 0 to 2**16 - 1."""
    counter = (block, row & _MASK, (row >> 32) & _MASK, torch.zeros_like(block))
    words = torch.stack(philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1)
    return torch.stack((words & (_LEVELS - 1), words >> 16), dim=-1).flatten(-2)


def keep_threshold(p: float) -> int:
    """The smallest number that keeps its element, from 0 (all kept) to 2**16 (none kept, of p = 1 alone)."""
    return _LEVELS if p == 1.0 else min(round(p * _LEVELS), _LEVELS - 1)


def kept_scale(p: float) -> float:
    """What a kept element is multiplied by: the reciprocal of the probability that one is kept; 0 where none is."""
    kept = _LEVELS - keep_threshold(p)
    return _LEVELS / kept if kept else 0.0


def dropout_mask(shape: torch.Size | tuple[int, ...], p: float, seed: Tensor) -> Tensor:
    """Which elements are kept: bool of ``shape`` on ``seed``'s device. ``seed`` is an int64 scalar tensor."""
    n = shape[-1] if shape else 1
    mask = torch.empty(shape, dtype=torch.bool, device=seed.device)
    rows = mask.view(-1, n) if n else mask.new_empty(0, 1)
    blocks = -(-n // _ELEMENTS)
    threshold = keep_threshold(p)
    for first in range(0, len(rows) * blocks, _CHUNK):
        index = torch.arange(first, min(first + _CHUNK, len(rows) * blocks), device=seed.device)
        row, block = index // blocks, index % blocks
        kept = random_numbers(row, block, seed) >= threshold  # (blocks, 8)
        column = block[:, None] * _ELEMENTS + torch.arange(_ELEMENTS, device=seed.device)
        inside = column < n
        rows.view(-1)[(row[:, None] * n + column)[inside]] = kept[inside]
    return mask


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``x`` where kept, times :func:`kept_scale`, and 0 elsewhere: a new contiguous tensor of x's shape and dtype.

    p = 0 is the identity (no mask is computed) and p = 1 gives zeros.
    """
    if p == 0.0:
        return x.clone(memory_format=torch.contiguous_format)
    if p == 1.0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    kept = dropout_mask(x.shape, p, seed.to(x.device))
    return torch.where(kept, x * kept_scale(p), x.new_zeros(()))

"""Philox-4x32-10, the counter-based random generator behind dropout, and the dropout defined on it.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the words are those of
Random123's ``philox4x32_R(10)`` and of Triton's ``tl.randint4x``.

Layout, the same on every backend: element i of the row-major flattened tensor takes word i % 4 of the block whose
counter is i // 4 (low 32 bits, high 32 bits, 0, 0) under the key (low, high 32 bits of the int64 seed). The element is
kept where that word, an unsigned 32-bit integer, is at least round(p * 2**32): an integer comparison, so the mask
depends on neither the dtype nor the device nor the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORDS = 4
_CHUNK = 1 << 13  # blocks at a time: temporaries stay in cache and below the size that is split over threads


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for each counter: int64 tensors of one shape that hold unsigned 32-bit values, as they come in.

    One round maps (c0, c1, c2, c3) to (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)); the key moves
    on by the Weyl constants after each of the ten rounds.
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


def random_words(start: int, count: int, seed: Tensor) -> Tensor:
    """The words of blocks ``start`` to ``start + count``: (count, 4) int64 holding unsigned 32-bit values."""
    block = torch.arange(start, start + count, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(block)
    words = philox_4x32((block & _MASK, block >> 32, zero, zero), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1)


def keep_threshold(p: float) -> int:
    """The smallest word that keeps its element: round(p * 2**32), from 0 (all kept) to 2**32 (none kept)."""
    return round(p * 2**32)


def dropout_mask(shape: torch.Size | tuple[int, ...], p: float, seed: Tensor) -> Tensor:
    """Which elements are kept: bool of ``shape`` on ``seed``'s device. ``seed`` is an int64 scalar tensor."""
    total = 1
    for size in shape:
        total *= size
    mask = torch.empty(total, dtype=torch.bool, device=seed.device)
    threshold = keep_threshold(p)
    for first in range(0, total, _WORDS * _CHUNK):
        part = mask[first : first + _WORDS * _CHUNK]
        blocks = -(-part.numel() // _WORDS)
        part.copy_((random_words(first // _WORDS, blocks, seed) >= threshold).flatten()[: part.numel()])
    return mask.reshape(shape)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``x`` where kept, scaled by 1/(1-p), and 0 elsewhere: a new contiguous tensor of x's shape and dtype.

    p = 0 is the identity (no mask is computed) and p = 1 gives zeros.
    """
    if p == 0.0:
        return x.clone(memory_format=torch.contiguous_format)
    if p == 1.0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    kept = dropout_mask(x.shape, p, seed.to(x.device))
    return torch.where(kept, x * (1.0 / (1.0 - p)), x.new_zeros(()))

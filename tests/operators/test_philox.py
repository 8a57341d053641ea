"""The random words of dropout, and the operator that drops by them."""

from __future__ import annotations

import math

import pytest
import torch

from stella_kernels.reference import philox
from tests.functional.adapter_layers import DTYPES, KERNELS


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    tensors = [torch.tensor([c]) for c in counter]
    found = philox.philox_4x32((tensors[0], tensors[1], tensors[2], tensors[3]), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in found) == words


def test_mask_follows_the_documented_layout() -> None:
    seed = torch.tensor(-(2**62) + 12345)  # a negative seed uses all 64 bits
    shape, p = (3, 4 * philox._CHUNK // 3 + 5), 0.3  # crosses a chunk, and ends inside a block
    mask = philox.dropout_mask(shape, p, seed).flatten()
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for i in (0, 1, 2, 3, 4, 4 * philox._CHUNK - 1, 4 * philox._CHUNK, mask.numel() - 1):
        zero = torch.zeros((), dtype=torch.int64)
        words = philox.philox_4x32((torch.tensor(i // 4), zero, zero, zero), key)
        assert bool(mask[i]) == (int(words[i % 4]) >= round(p * 2**32)), i


def test_block_counter_uses_its_high_half() -> None:
    seed = torch.tensor(3)
    start = 2**32 - 1
    first, second = philox.random_words(start, 2, seed)
    zero, one = torch.tensor(0), torch.tensor(1)
    key = (seed, zero)
    assert first.tolist() == [int(w) for w in philox.philox_4x32((torch.tensor(start), zero, zero, zero), key)]
    assert second.tolist() == [int(w) for w in philox.philox_4x32((zero, one, zero, zero), key)]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    count = 200_000
    seed = torch.randint(2**63 - 1, ())
    kept = int(philox.dropout_mask((count,), p, seed).sum())
    # binomial: standard deviation sqrt(count p (1 - p)); beyond six of them once in 5e8 seeds
    assert abs(kept - count * (1 - p)) <= 6 * math.sqrt(count * p * (1 - p))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_scales_what_it_keeps_and_zeroes_the_rest(dtype: torch.dtype) -> None:
    x, seed, p = torch.randn(7, 13).to(dtype), torch.tensor(5), 0.25
    x[3] = torch.nan  # a dropped NaN is gone
    found = KERNELS.philox_dropout(x, p, seed)
    kept = philox.dropout_mask(x.shape, p, seed)
    assert found.dtype == dtype
    assert torch.equal(found[~kept], torch.zeros_like(found[~kept]))
    wide = x.double() / (1 - p)
    # the reciprocal and the product round once each, in float32 at least, and the store once
    bound = 3 * torch.finfo(dtype).eps / 2 * wide.abs()
    clean = kept & ~x.isnan()
    assert bool(((found.double() - wide).abs() <= bound)[clean].all())
    assert bool(found[kept & x.isnan()].isnan().all())


def test_dropout_of_zero_and_one() -> None:
    x, seed = torch.randn(5, 3), torch.tensor(1)
    assert torch.equal(KERNELS.philox_dropout(x, 0.0, seed), x)
    assert torch.equal(KERNELS.philox_dropout(x, 1.0, seed), torch.zeros_like(x))
    assert KERNELS.philox_dropout(x[:0], 0.5, seed).shape == (0, 3)

"""The random words of dropout, and the operator that drops by them."""

from __future__ import annotations

import math

import pytest
import torch

from stella_kernels.reference import philox
from tests.functional.adapter_layers import DTYPES, KERNELS


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32 of seven rounds
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    tensors = [torch.tensor([c]) for c in counter]
    found = philox.philox_4x32((tensors[0], tensors[1], tensors[2], tensors[3]), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in found) == words


@pytest.mark.parametrize("shape", [(3, 2 * philox._CHUNK + 5), (2 * philox._CHUNK, 9), (2, 5, 12), (7,)])
def test_mask_follows_the_documented_layout(shape: tuple[int, ...]) -> None:
    seed, p = torch.tensor(-(2**62) + 12345), 0.3  # a negative seed uses all 64 bits
    mask = philox.dropout_mask(shape, p, seed).reshape(-1, shape[-1])  # crosses chunks, and rows end inside a block
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    zero = torch.zeros((), dtype=torch.int64)
    for row in {0, 1, len(mask) // 2, len(mask) - 1} & set(range(len(mask))):
        for column in {*range(9), shape[-1] - 1} & set(range(shape[-1])):
            words = philox.philox_4x32((torch.tensor(column // 8), torch.tensor(row), zero, zero), key)
            number = int(words[column % 8 // 2]) >> 16 * (column % 2) & 0xFFFF
            assert bool(mask[row, column]) == (number >= round(p * 2**16)), (row, column)


def test_the_counter_has_all_bits_of_a_row() -> None:
    seed, row, block = torch.tensor(3), torch.tensor([2**32 + 5, 5]), torch.tensor([1, 1])
    high, low = philox.random_numbers(row, block, seed)
    zero, one, five = (torch.tensor(value) for value in (0, 1, 5))
    for found, top in ((high, one), (low, zero)):
        words = philox.philox_4x32((one, five, top, zero), (seed, zero))
        assert found.tolist() == [half for w in words for half in (int(w) & 0xFFFF, int(w) >> 16)]


@pytest.mark.parametrize("p", [1e-300, 1e-6, 0.1, 0.3, 1 - 1e-6, 1 - 1e-16, 1.0])
def test_what_is_kept_keeps_the_mean(p: float) -> None:
    threshold = philox.keep_threshold(p)
    kept = sum(number >= threshold for number in range(2**16)) / 2**16  # of all numbers
    assert kept * philox.kept_scale(p) == pytest.approx(1.0 if p < 1.0 else 0.0, rel=1e-15)
    assert abs(kept - (1.0 - p)) <= 2**-17 or (p > 1.0 - 2**-17 and kept == 2**-16)


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
    wide = x.double() * philox.kept_scale(p)
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

"""The phases of a step on some rows of each factor, compiled and emulated: of two processes, and a long step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stella_kernels.operators.fallback import REFERENCE
from stella_kernels.reference import stiefel
from tests.ptx import emulator
from tests.random_matrices import orthonormal

pytest.importorskip("triton")

ROWS = ((2100, 12), (9, 5)), ((40, 12), (0, 5))  # of two factors, on two processes
SETTINGS = [1e-2, 0.9, 0.99, 1e-8, 3.0, 1.0, 1.0]


def _split(wholes: list[Tensor]) -> list[list[Tensor]]:
    """Copies of each process's rows."""
    parts = [whole.split([rows[i][0] for rows in ROWS]) for i, whole in enumerate(wholes)]
    return [[part.clone() for part in own] for own in zip(*parts, strict=True)]


def _wholes(scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(sum(rows[i][0] for rows in ROWS), ROWS[0][i][1]) for i in range(2)]


def _factors() -> list[Tensor]:
    return [orthonormal(*whole.shape, dtype=torch.float32) for whole in _wholes()]


@pytest.fixture(autouse=True)
def _without_noise() -> Iterator[None]:
    """Which would decide otherwise on every process."""
    with emulator.unkind(emulator.RACES | emulator.TRUNCATE):
        yield


@pytest.mark.slow
def test_a_step_of_two_processes() -> None:
    """Against the reference: both are off by some round-off u of what is summed, r products deep."""
    Y, G, m, v = _factors(), _wholes(), _wholes(), [whole.square() + 0.5 for whole in _wholes()]
    rows = torch.tensor([SETTINGS] * 2, dtype=torch.float64)
    found = []
    for operators in (emulator.operators(), REFERENCE):
        held, gradients, firsts, seconds = map(_split, (Y, G, m, v))
        sums = sum(map(operators["gradient_gram"], gradients, held))
        grams, steps = zip(
            *(operators["adamw_gram_"](*own, sums, rows) for own in zip(held, gradients, firsts, seconds, strict=True)),
            strict=True,
        )
        infos = [operators["adamw_rows_"](own, step, sums, sum(grams)) for own, step in zip(held, steps, strict=True)]
        assert torch.equal(*infos)
        assert not bool(infos[0][:, 0].any())
        found.append([*held[0], *held[1], *firsts[0], *seconds[0], *steps])
    for kernel, wanted in zip(*found, strict=True):
        most = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(kernel, wanted, rtol=0.0, atol=64 * 2.0**-24 * most)


@pytest.mark.slow
def test_a_long_step_and_another_retraction() -> None:
    """What is reported bounds the error of the first; the second is at round-off."""
    operators = emulator.operators()
    Y = _factors()
    Z = [each.clone() for each in Y]
    Z[0][:, 0] += 50.0 * orthonormal(len(Z[0]), 1, dtype=torch.float32)[:, 0]
    moved, previous, ones = _split(Z), _split(Y), [1.0, 1.0]
    sums = sum(operators["gradient_gram"](own, own) for own in previous)
    grams = sum(operators["retract_gram"](*own, ones) for own in zip(moved, previous, strict=True))
    info = [operators["retract_rows_"](*own, ones, sums, grams) for own in zip(moved, previous, strict=True)]
    assert torch.equal(*info)
    assert info[0][:, [0, 3]].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    _judge(moved, info[0])
    for own, before in zip(moved, previous, strict=True):
        for new, old in zip(own, before, strict=True):
            old.copy_(new)
    sums = sum(operators["gradient_gram"](own, own) for own in previous)
    still = torch.zeros_like(grams)
    again = [operators["retract_rows_"](*own, ones, sums, still) for own in zip(moved, previous, strict=True)]
    _judge(moved, again[0])
    assert float(again[0][:, 1].max()) < 1e-4


def _judge(moved: list[list[Tensor]], info: Tensor) -> None:
    for parts, row in zip(zip(*moved, strict=True), info.tolist(), strict=True):
        assert float(stiefel.orthonormality_error(torch.cat(parts).double())) <= row[1]

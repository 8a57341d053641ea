"""What ``info`` promises, and that nothing is returned or half written where a promise cannot be kept."""

from __future__ import annotations

import math

import pytest
import torch

from stella_kernels.operators import status
from tests.random_matrices import orthonormal

kernels = torch.ops.stella_kernels

FLOAT_EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", ["rows", "columns", "strided"])
def test_the_residual_and_the_drift_of_columns_of_one_magnitude(dtype: torch.dtype, storage: str) -> None:
    """Of +c and −c: every sum of squares rounds the same way at every term, which random columns never do."""
    for r, times in ((4, 75), (8, 93), (8, 227), (16, 59), (32, 21)):
        signs = torch.ones(1, 1, dtype=torch.float64)
        while len(signs) < r:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        n = r * times
        Y = (signs.repeat(times, 1) / math.sqrt(n)).to(dtype)
        if storage == "columns":
            Y = Y.mT.contiguous().mT
        elif storage == "strided":
            Y = torch.zeros(2 * n, 3 * r, dtype=dtype)[::2, ::3].copy_(Y)
        moved = torch.empty_like(Y).copy_(Y)
        moved[0] += 1e-3
        zero = torch.zeros_like(Y)
        off = (Y.double().mT @ Y.double() - torch.eye(r)).norm()
        law = 8 * FLOAT_EPS
        assert abs(kernels.riemannian_gradient_([zero], [Y], [])[0, 4] - off) <= law * math.sqrt(r)
        row = kernels.project_retract_([moved], [Y], [1.0], "auto")[0]
        assert abs(row[4] - off) <= law * math.sqrt(r)
        assert (moved.double().mT @ moved.double() - torch.eye(r)).norm() <= row[1] + 1e-15 * r
        Q, info = kernels.polar(3.3 * Y, "auto")
        assert (Q.double().mT @ Q.double() - torch.eye(r)).norm() <= info[0, 1] + 1e-15 * r


def test_a_step_of_columns_of_very_different_lengths_is_retracted_to_round_off() -> None:
    """Whatever the iteration says of itself: at 20 it once stopped 1e-4 short of orthonormal, and said ok."""
    worst = 0.0
    for seed in range(60):
        torch.manual_seed(seed)
        n, r = ((774, 6), (60, 8), (300, 16))[seed % 3]
        Y = orthonormal(n, r).float()
        length = (12.0, 16.0, 20.0, 25.0)[seed % 4]
        moved = Y + length * (torch.randn(n, r) / math.sqrt(n)) * torch.logspace(0, -12, r)
        info = kernels.project_retract_([moved], [Y], [1.0], "auto")
        assert info[0, 0] == status.STATUS_OK
        error = float((moved.double().mT @ moved.double() - torch.eye(r)).norm())
        assert error <= info[0, 1]
        worst = max(worst, error / math.sqrt(r))
    assert worst <= 8 * FLOAT_EPS


@pytest.mark.parametrize("decades", [12, 13, 14, 15])
def test_columns_far_below_the_largest_come_out_orthonormal(decades: int) -> None:
    short = 10.0**-decades
    for r in (3, 6, 12):
        M = torch.zeros(2 * r + 30, r, dtype=torch.float64)
        M[0, 0] = 1.0
        M[1:, 1:] = short * torch.randn(2 * r + 29, r - 1, dtype=torch.float64) / math.sqrt(2 * r + 29)
        Q, info = kernels.polar(M, "auto")
        assert (Q.mT @ Q - torch.eye(r)).norm() <= 64 * torch.finfo(torch.float64).eps * r
        assert info[0, 0] == status.STATUS_OK


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_overflowing_gradient_stops_the_list_before_anything_is_written(dtype: torch.dtype) -> None:
    """y = (1, 1, 1, 1) / 2 and ∇ = h (−1, 1, 1, 1): ∇ − y (∇ᵀy) has −3/2 h in front, 1/2 h elsewhere."""
    h = 0.75 * torch.finfo(dtype).max
    y = torch.full((4, 1), 0.5, dtype=dtype)
    large = torch.tensor([[-h], [h], [h], [h]], dtype=dtype)
    other = orthonormal(37, 5).to(dtype)
    gradients = [torch.randn(37, 5).to(dtype), large, torch.randn(37, 5).to(dtype)]
    snapshots = [torch.full_like(Y, 7.0) for Y in (other, y, other)]
    before = [G.clone() for G in gradients]
    info = kernels.riemannian_gradient_(gradients, [other, y, other], snapshots)
    assert info[:, 0].tolist() == [status.STATUS_OK, status.STATUS_OVERFLOW, status.STATUS_OK]
    assert all(torch.equal(G, was) for G, was in zip(gradients, before, strict=True))
    assert all(bool((each == 7.0).all()) for each in snapshots)
    within = (gradients[1] / 2).clone()  # 3/4 of the range, which no bound without the signs would let pass
    info = kernels.riemannian_gradient_([within], [y], [])
    assert info[0, 0] == status.STATUS_OK
    assert bool(within.isfinite().all())


# Of 'previous', in units of what it would be were it orthonormal: how far from the manifold it may lie.
FAR = {
    "long": lambda Q, scale: Q * scale,
    "skewed": lambda Q, scale: torch.randn_like(Q) * scale,
    "of one column": lambda Q, scale: Q[:, :1].expand_as(Q) * scale,
    "of rank one": lambda Q, scale: Q[:, :1] @ torch.randn_like(Q[:1]) * scale,
    "graded": lambda Q, scale: Q * torch.logspace(0, -6, Q.shape[1], dtype=Q.dtype),
    "zero": lambda Q, scale: Q * 0.0,
}


@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["auto", "newton_schulz", "svd"])
def test_far_from_the_manifold_a_retraction_is_orthonormal_or_says_so(kind: str, dtype: torch.dtype, method: str):
    """Y, to which a long Y's move is added, leaves its round-off: once 0.2 at status 0 and a residual of 2e-6."""
    exponents = range(-3, 4) if dtype == torch.float16 else range(-8, 9, 2)
    kept = 0
    for seed, exponent in enumerate(exponents):
        torch.manual_seed(seed)
        n, r = ((300, 4), (40, 3), (7, 7), (16, 1))[seed % 4]
        previous = FAR[kind](orthonormal(n, r), 10.0**exponent).to(dtype)
        step = torch.randn(n, r, dtype=torch.float64) * (0.0, 1e-3, 1.0)[seed % 3]
        moved = (previous.double() + step).to(dtype)
        before = moved.clone()
        row = kernels.project_retract_([moved], [previous], [1.0], method)[0]
        if row[0] != status.STATUS_OK:
            assert torch.equal(moved, before)
            continue
        kept += 1
        error = (moved.double().mT @ moved.double() - torch.eye(r)).norm()
        assert error <= row[1] + 1e-15 * r
        unit = max(torch.finfo(dtype).eps, 1e-15)
        # the bound's own width: 8 times the condition's limit of 16 and rounding to storage (csrc's residual.h)
        assert row[1] <= 150 * unit * r
    assert kept or kind in ("zero", "of one column", "of rank one")

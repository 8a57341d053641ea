"""What only many steps show: drift, distance from the float64 trajectory; and that threads do not matter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from stella_kernels.nn import StiefelFactor
from stella_kernels.operators import backends
from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.reference import stiefel
from stella_kernels.reference.step import PublishedStep
from tests.optim.stiefel_problem import F64
from tests.random_matrices import orthonormal

native = pytest.mark.skipif(backends.serving("stella_adamw_") != "cpu", reason="the native library does not serve here")
FLOAT_EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def factor_of(value: Tensor, transposed: bool, name: str = "Y") -> StiefelFactor:
    """A factor with a copy of the value (n, r), stored (r, n) where transposed."""
    own = value.mT.contiguous() if transposed else value.contiguous()
    return StiefelFactor(nn.Parameter(own.clone()), transposed, name)


def give_gradient(factor: StiefelFactor, gradient: Tensor) -> None:
    stored = gradient.mT if factor.transposed else gradient
    factor.parameter.grad = stored.to(factor.parameter.dtype, copy=True).contiguous()


def build(how: str, factors: list[StiefelFactor], lr: float) -> Any:
    parameters = [f.parameter for f in factors]
    if how == "stella_adamw":
        return StellaAdamW(parameters, lr=lr, weight_decay=0.0, factors=factors, grad_scaling=False)
    optimizer = AdamW(parameters, lr=lr, weight_decay=0.0)
    attach(optimizer, factors, retraction=how, grad_scaling=False)
    return optimizer


# ---- drift -----------------------------------------------------------------------------------------------------------


@native
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", ["stella_adamw", "polar"])
def test_ten_thousand_random_steps_do_not_drift(how: str) -> None:
    """Every step starts from the Gram of what the last one left, so the residual is one retraction's: a few round-offs.

    What a factor is rounded to leaves 6e-8 sqrt(2) or so of each column; 5e-7 sqrt(r) is eight times that.
    """
    n, r = 64, 8
    factors = [factor_of(orthonormal(n, r, dtype=torch.float32), transposed) for transposed in (False, True)]
    start = [f.view.clone() for f in factors]
    optimizer = build(how, factors, lr=1e-2)
    for step in range(10_000):
        for factor in factors:
            give_gradient(factor, torch.randn(n, r))
        optimizer.step()
        if step % 1000 == 999:
            for factor in factors:
                assert float(stiefel.orthonormality_error(factor.view.double())) < 5e-7 * math.sqrt(r)
    for factor, first in zip(factors, start, strict=True):
        assert float(torch.linalg.norm(factor.view - first)) > 1.0  # it went far


# ---- against the float64 trajectory ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("retraction", sorted(stiefel.RETRACTIONS))
def test_attach_in_float32_stays_with_float64_over_50_steps(retraction: str, transposed: bool) -> None:
    """The same 50 gradients in both: 1e-5 relative is 50 steps of 1.7 eps each, if no two errors cancel."""
    n, r = 96, 8
    start, gradients = orthonormal(n, r), torch.randn(50, n, r, dtype=F64)
    exact, single = factor_of(start, transposed), factor_of(start.float(), transposed)
    inner = AdamW([exact.parameter], lr=5e-3, weight_decay=0.0)
    published = PublishedStep(inner, [exact], retraction=retraction)
    optimizer = build(retraction, [single], lr=5e-3)
    for gradient in gradients:
        for factor, step in ((exact, published.step), (single, optimizer.step)):
            give_gradient(factor, gradient)
            step()
    assert float(torch.linalg.norm(exact.view - start)) > 0.1 * math.sqrt(r)
    assert float(torch.linalg.norm(single.view.double() - exact.view)) < 1e-5 * math.sqrt(r)


# ---- threads ---------------------------------------------------------------------------------------------------------


def trajectory(how: str, count: int) -> list[Tensor]:
    """Five steps on ``count`` threads: a factor tall enough for threads to share its rows, and small ones."""
    torch.set_num_threads(count)
    torch.manual_seed(3)
    shapes = [(9001, 16), (41, 7), (130, 33), (7, 7), (515, 8)]
    factors = [factor_of(orthonormal(n, r, dtype=torch.float32), i % 2 == 0, str(i)) for i, (n, r) in enumerate(shapes)]
    optimizer = build(how, factors, lr=1e-3)
    for _ in range(5):
        for factor in factors:
            give_gradient(factor, torch.randn(factor.view.shape))
        optimizer.step()
    states = [optimizer.state[f.parameter][key] for f in factors for key in ("exp_avg", "exp_avg_sq")]
    return [*(f.view.clone() for f in factors), *states]


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("how", ["stella_adamw", "polar"])
def test_bitwise_repeatable_for_a_number_of_threads(how: str, count: int) -> None:
    first = trajectory(how, count)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, trajectory(how, count), strict=True))


@native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("how", ["stella_adamw", "polar"])
def test_number_of_threads_changes_round_off_at_most(how: str) -> None:
    """Five steps in each of two runs, each off by 8 w sqrt(r) as a single call is (verification/judge.py).

    An element of the gradient near 0 is off by more than that relative to itself, which m / sqrt(v) shows; but it is
    one in a million that is off by as much as it is long, and it moves by lr = 1e-3 at most.
    """
    for a, b in zip(trajectory(how, 1), trajectory(how, 2), strict=True):
        tolerance = 2 * 5 * 8 * FLOAT_EPS / 2 * math.sqrt(min(a.shape))
        assert float(torch.linalg.norm(a - b)) <= tolerance * float(torch.linalg.norm(a))

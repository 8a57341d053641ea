"""The operator of the Riemannian AdamW step against its float64 reference."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stella_kernels.operators.fallback import REFERENCE
from stella_kernels.reference import adamw as reference
from tests.optim.stiefel_problem import F64
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")


OPERATORS = {
    "dispatched": lambda *args: torch.ops.stella_kernels.stella_adamw_(*args),
    "reference": REFERENCE["stella_adamw_"],
}
SHAPES = [(1, 1), (5, 5), (37, 4), (130, 16), (300, 33), (64, 1)]
ROWS = [[1e-2, 0.9, 0.999, 1e-8, 3.0, 1.7, 1.0], [3e-3, 0.8, 0.99, 1e-6, 7.0, 0.6, -1.0]]


class Case:
    """Arguments of the operator on fresh random factors, alternately of either storage; every other K is given."""

    def __init__(self, dtype: torch.dtype, shapes: list[tuple[int, int]] = SHAPES) -> None:
        self.lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        for i, (n, r) in enumerate(shapes):
            Y, G = orthonormal(n, r).to(dtype), torch.randn(n, r, dtype=F64).to(dtype)
            m, v = 0.1 * torch.randn(n, r, dtype=F64).to(dtype), torch.rand(n, r, dtype=F64).to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            K = (G.to(wide).mT @ Y.to(wide)) if i % 2 else Y.new_empty(0)
            stored = [t.mT.contiguous().mT if i % 3 == 1 else t for t in (Y, G, m, v)]
            for values_of_kind, value in zip(self.lists, [*stored, K], strict=True):
                values_of_kind.append(value)
        self.hyperparameters = torch.tensor([ROWS[i % 2] for i in range(len(shapes))], dtype=F64)

    def arguments(self) -> tuple[Any, ...]:
        return (*self.lists, self.hyperparameters)

    def expected(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(Y, m, v) after the step, in float64."""
        results = []
        for *given, _, row in zip(*self.lists, self.hyperparameters.tolist(), strict=True):
            names = ("lr", "beta1", "beta2", "eps", "step", "divisor", "sign")
            exact = reference.riemannian_adamw_step(*(t.double() for t in given), **dict(zip(names, row, strict=True)))
            results.append(exact)
        return results


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_operator_equals_the_float64_reference(operator: str, dtype: torch.dtype) -> None:
    """Y, m and v to 32 roundings, relative in norm, and to one of the storage dtype.

    g takes two products of length n and r, whose errors grow with their square roots at worst (r ≤ 33, and the rows
    of Y have norm sqrt(r/n)), so g, m, v stay within some ten eps; the retraction adds a few. The move enters Y at
    lr = 1e-2, so that an error of it counts for less: a v so small that m / sqrt(v) blows one up is no matter.
    """
    case = Case(dtype)
    expected = case.expected()
    gradients = [g.clone() for g in case.lists[1]]
    info = OPERATORS[operator](*case.arguments())
    half = dtype in (torch.bfloat16, torch.float16)
    arithmetic = torch.float32 if half else dtype
    tolerance = 32 * torch.finfo(arithmetic).eps + (torch.finfo(dtype).eps if half else 0)
    for (Y, m, v), got_Y, got_m, got_v in zip(expected, *(case.lists[i] for i in (0, 2, 3)), strict=True):
        for exact, got in ((Y, got_Y), (m, got_m), (v, got_v)):
            assert float(torch.linalg.norm(got.double() - exact)) <= tolerance * float(torch.linalg.norm(exact))
    assert bool((info[:, 0] == 0).all())
    assert info.shape == (len(SHAPES), 5)
    assert info.dtype == F64
    assert all(torch.equal(g, before) for g, before in zip(case.lists[1], gradients, strict=True))


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operator_writes_nothing_beside_a_nan(operator: str) -> None:
    case = Case(torch.float32)
    case.lists[1][2][3, 1] = math.nan
    case.lists[1][4][5, 0] = -math.inf
    before = copy.deepcopy(case.lists)
    info = OPERATORS[operator](*case.arguments())
    assert info[:, 0].tolist() == [0, 0, 1, 0, 1, 0]
    assert bool(info[:, 4].isnan().all())
    for kept, now in zip(before, case.lists, strict=True):
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_written_where_a_second_moment_would_overflow(operator: str, dtype: torch.dtype) -> None:
    """(1 − β₂) g² is out of range where g² is by a factor of 1e4; g at 1e-4 of that is a step like any other."""
    for size, status in ((1e2, 3), (1e-2, 0)):
        case = Case(dtype)
        large = size * math.sqrt(torch.finfo(dtype).max)
        for i in (2, 3):  # K computed, and K given
            case.lists[1][i].copy_(large * case.lists[1][i].sign())
            case.lists[4][i].mul_(large)
        before = copy.deepcopy(case.lists)
        info = OPERATORS[operator](*case.arguments())
        assert info[:, 0].tolist() == [0, 0, status, status, 0, 0]
        assert bool(info[:, 1].isnan().all()) == (status == 3)
        for kind in (0, 2, 3):
            for i in range(6):
                assert bool(case.lists[kind][i].isfinite().all())
                if status == 3 or kind == 2:
                    assert torch.equal(case.lists[kind][i], before[kind][i]) == (status == 3)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("where", [0, 2, 3])
def test_operator_does_not_move_a_factor_to_nan(operator: str, where: int) -> None:
    """``where``: NaN in a factor or in a moment; the other factors take their step."""
    case = Case(torch.float32)
    case.lists[where][3][2, 1] = math.nan
    before = copy.deepcopy(case.lists[0])
    info = OPERATORS[operator](*case.arguments())
    assert info[:, 0].tolist() == [0, 0, 0, 1, 0, 0]
    assert torch.equal(case.lists[0][3].nan_to_num(), before[3].nan_to_num())
    assert all(bool(case.lists[0][i].isfinite().all()) for i in (0, 1, 2, 4, 5))
    assert not torch.equal(case.lists[0][4], before[4])


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operator_takes_no_factors(operator: str) -> None:
    info = OPERATORS[operator]([], [], [], [], [], torch.empty(0, 7, dtype=F64))
    assert info.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_declares_what_it_does(dtype: torch.dtype) -> None:
    case = Case(dtype, [(37, 4), (20, 3)])
    torch.library.opcheck(torch.ops.stella_kernels.stella_adamw_.default, case.arguments())

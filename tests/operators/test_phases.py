"""The phases of a step on some rows of each factor: summed over the parts, the step of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stella_kernels.operators.fallback import REFERENCE
from stella_kernels.operators.signatures import PHASES
from stella_kernels.operators.status import (
    DRIFT,
    RESIDUAL,
    STATUS_NOT_CONVERGED,
    STATUS_OK,
    arithmetic_dtype,
    grams_words,
    sums_words,
)
from tests.random_matrices import orthonormal

Operators = dict[str, Callable[..., Any]]
BACKENDS: dict[str, Operators] = {
    "registered": {s.name: getattr(torch.ops.stella_kernels, s.name) for s in PHASES},
    "reference": {s.name: REFERENCE[s.name] for s in PHASES},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(61, 8), (2100, 16), (9, 1), (33, 5), (130, 33)]
CUTS: list[tuple[int, ...]] = [(7, 7, 40), (), (3,)]  # uneven and empty, all in one, fewer rows than columns
SETTINGS = [1e-2, 0.9, 0.999, 1e-8, 3.0, 1.3, 1.0]


def parts(t: Tensor, cuts: tuple[int, ...], transposed: bool) -> list[Tensor]:
    """Rows of a matrix, each part memory of its own: by rows, or by columns as of a factor stored transposed."""
    found = [t[begin:end].clone() for begin, end in zip((0, *cuts), (*cuts, t.shape[0]), strict=True)]
    return [p.mT.contiguous().mT if transposed else p for p in found]


def whole(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors)


def tolerance(dtype: torch.dtype, n: int, r: int) -> float:
    """Of a difference in Frobenius norm: a few roundings of r columns in the dtype, sums over n in its arithmetic."""
    eps, wide = torch.finfo(dtype).eps, torch.finfo(arithmetic_dtype(dtype)).eps
    return (2 * eps + 16 * wide * math.sqrt(n)) * math.sqrt(r)


class Case:
    def __init__(self, n: int, r: int, dtype: torch.dtype, cuts: tuple[int, ...], transposed: bool) -> None:
        torch.manual_seed(n + r)
        Y, G, m = orthonormal(n, r, dtype=torch.float64), torch.randn(n, r), 0.1 * torch.randn(n, r)
        v = 0.1 * torch.rand(n, r) + 0.01
        self.wide = [t.to(dtype).double() for t in (Y, G, m, v)]
        self.lists = [parts(t.to(dtype), cuts, transposed) for t in self.wide]
        self.dtype, self.tolerance = dtype, tolerance(dtype, n, r)

    def sums(self, operators: Operators) -> Tensor:
        Y, G, _, _ = self.lists
        return torch.stack([operators["gradient_gram"]([g], [y]) for g, y in zip(G, Y, strict=True)]).sum(0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, cuts: tuple[int, ...], transposed: bool
) -> None:
    operators, case = BACKENDS[backend], Case(*shape, dtype, cuts, transposed)
    Y, G, m, v = case.lists
    h = torch.tensor([SETTINGS], dtype=torch.float64)
    wanted = [t.clone() for t in case.wide]
    REFERENCE["stella_adamw_"](wanted[:1], wanted[1:2], wanted[2:3], wanted[3:], [wanted[0].new_empty(0)], h)
    sums = case.sums(operators)
    made = [operators["adamw_gram_"]([y], [g], [a], [b], sums, h) for y, g, a, b in zip(Y, G, m, v, strict=True)]
    grams = torch.stack([gram for gram, _ in made]).sum(0)
    infos = [operators["adamw_rows_"]([y], steps, sums, grams) for y, (_, steps) in zip(Y, made, strict=True)]
    assert all(torch.equal(info, infos[0]) for info in infos)
    assert infos[0][0, 0] == STATUS_OK
    for found, right in ((Y, wanted[0]), (m, wanted[2]), (v, wanted[3])):
        assert (whole(found).double() - right).norm() <= case.tolerance * max(1.0, float(right.norm()))
    Q = whole(Y).double()
    error = float((Q.mT @ Q - torch.eye(shape[1])).norm())
    assert error <= infos[0][0, RESIDUAL] <= 1e3 * case.tolerance


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_and_retraction(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, cuts: tuple[int, ...], transposed: bool
) -> None:
    operators, case = BACKENDS[backend], Case(*shape, dtype, cuts, transposed)
    Y, G, move, _ = case.lists
    sums = case.sums(operators)
    K = case.wide[1].mT @ case.wide[0]
    snapshots = [torch.full_like(y, torch.nan) for y in Y]
    for y, g, kept in zip(Y, G, snapshots, strict=True):
        operators["riemannian_gradient_rows_"]([g], [y], [kept], sums)
    right = case.wide[1] - case.wide[0] @ K
    assert (whole(G).double() - right).norm() <= case.tolerance * float(right.norm() + K.norm())
    assert torch.equal(whole(snapshots), whole(Y))
    moved = [(y + d).clone() for y, d in zip(Y, move, strict=True)]
    wanted = whole(moved).double()
    REFERENCE["project_retract_"]([wanted], [case.wide[0]], [1.7], "auto")
    grams = torch.stack([operators["retract_gram"]([a], [b], [1.7]) for a, b in zip(moved, Y, strict=True)]).sum(0)
    infos = [operators["retract_rows_"]([a], [b], [1.7], sums, grams) for a, b in zip(moved, Y, strict=True)]
    assert all(torch.equal(info, infos[0]) for info in infos)
    if infos[0][0, RESIDUAL] <= 0.01:
        assert (whole(moved).double() - wanted).norm() <= 8 * case.tolerance * math.sqrt(shape[1])
    assert infos[0][0, DRIFT] <= case.tolerance * math.sqrt(shape[1])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_step_is_solved_and_a_second_retraction_takes_it_to_round_off(backend: str, dtype: torch.dtype) -> None:
    operators = BACKENDS[backend]
    torch.manual_seed(3)
    Y = orthonormal(300, 6, dtype=dtype)
    step = torch.randn(300, 6, dtype=dtype) * torch.logspace(-3, 0.7, 6, dtype=dtype)
    moved, wanted = Y + step, (Y + step).double()
    REFERENCE["project_retract_"]([wanted], [Y.double()], [1.0], "auto")
    sums = operators["gradient_gram"]([Y], [Y])
    grams = operators["retract_gram"]([moved], [Y], [1.0])
    info = operators["retract_rows_"]([moved], [Y], [1.0], sums, grams)
    assert info[0, 0] == STATUS_OK
    again, zero = operators["gradient_gram"]([moved], [moved]), torch.zeros(grams_words(6), dtype=sums.dtype)
    second = operators["retract_rows_"]([moved], [moved.clone()], [1.0], again, zero)
    assert second[0, RESIDUAL] <= 1e3 * torch.finfo(dtype).eps
    # the condition number of a move, some 1e2, squared, is what the sums' round-off counts for
    assert (moved.double() - wanted).norm() <= 1e5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_dependent_columns_are_not_retracted(backend: str) -> None:
    operators = BACKENDS[backend]
    Y = orthonormal(40, 4, dtype=torch.float32)
    Y[:, 1] = Y[:, 0]
    before = Y.clone()
    sums, zero = operators["gradient_gram"]([Y], [Y]), torch.zeros(grams_words(4))
    info = operators["retract_rows_"]([Y], [before], [1.0], sums, zero)
    assert info[0, 0] == STATUS_NOT_CONVERGED
    assert torch.equal(Y, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_wrong_shows_in_the_sums(backend: str, dtype: torch.dtype) -> None:
    gram = BACKENDS[backend]["gradient_gram"]
    Y, G = orthonormal(50, 3, dtype=torch.float64).to(dtype), torch.randn(50, 3).to(dtype)
    assert torch.isfinite(gram([G], [Y])).all()
    norm = float(gram([G], [Y])[-1])
    assert float(G.double().norm()) * (1 - 1e-6) <= norm <= math.sqrt(150) * float(G.abs().max()) * (1 + 1e-2)
    for value in (torch.nan, torch.inf):
        bad = G.clone()
        bad[7, 1] = value
        assert math.isnan(float(gram([bad], [Y])[-1]))
        bad = Y.clone()
        bad[7, 1] = value
        assert not torch.isfinite(gram([G], [bad])[9:-1]).all()
    large = torch.full_like(G, torch.finfo(dtype).max)
    assert math.isfinite(float(gram([large], [Y])[-1]))


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(1)
    lists = [[torch.randn(n, 16) for n in (9000, 40, 5000, 0)] for _ in range(2)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ops.stella_kernels.gradient_gram(*lists))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
    assert found[0].shape == (4 * sums_words(16),)


def test_several_factors_of_several_ranks_are_one_after_another() -> None:
    torch.manual_seed(2)
    shapes = [(20, 3), (0, 5), (11, 1)]
    factors, gradients = ([torch.randn(*shape) for shape in shapes] for _ in range(2))
    flat = torch.ops.stella_kernels.gradient_gram(gradients, factors)
    apart = [torch.ops.stella_kernels.gradient_gram([g], [f]) for g, f in zip(gradients, factors, strict=True)]
    assert torch.equal(flat, torch.cat(apart))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_far_off_the_manifold_is_not_called_good(backend: str) -> None:
    """Y is so long that what is taken from it leaves only round-off: the residual says so, or nothing is written."""
    operators = BACKENDS[backend]
    Y = 1e4 * orthonormal(400, 4, dtype=torch.float32)
    moved = torch.randn(400, 4)
    sums, grams = operators["gradient_gram"]([Y], [Y]), operators["retract_gram"]([moved], [Y], [1.0])
    info = operators["retract_rows_"]([moved], [Y], [1.0], sums, grams)
    error = float((moved.double().mT @ moved.double() - torch.eye(4)).norm())
    assert info[0, 0] == STATUS_NOT_CONVERGED or error <= info[0, RESIDUAL]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_columns(backend: str) -> None:
    operators = BACKENDS[backend]
    Y = torch.empty(7, 0)
    sums, grams = operators["gradient_gram"]([Y], [Y]), operators["retract_gram"]([Y.clone()], [Y], [1.0])
    assert operators["retract_rows_"]([Y.clone()], [Y], [1.0], sums, grams)[0, 0] == STATUS_OK


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend: str) -> None:
    operators = BACKENDS[backend]
    Y, G = torch.randn(9, 2), torch.randn(9, 2)
    sums = operators["gradient_gram"]([G], [Y])
    with pytest.raises(RuntimeError, match=r"gradient_gram: gradients\[0\]: found .*wanted"):
        operators["gradient_gram"]([G[:5]], [Y])
    with pytest.raises(RuntimeError, match=r"riemannian_gradient_rows_: sums: found"):
        operators["riemannian_gradient_rows_"]([G], [Y], [], sums[:-1])
    with pytest.raises(RuntimeError, match=r"retract_gram: divisors"):
        operators["retract_gram"]([G], [Y], [0.0])
    with pytest.raises(RuntimeError, match=r"retract_rows_: grams: found"):
        operators["retract_rows_"]([G], [Y], [1.0], sums, sums)
    with pytest.raises(RuntimeError, match=r"adamw_gram_: hyperparameters"):
        operators["adamw_gram_"]([Y], [G], [G.clone()], [G.clone()], sums, torch.zeros(1, 6, dtype=torch.float64))
    grams = operators["retract_gram"]([G], [Y], [1.0])
    for steps in (torch.zeros(5), torch.zeros(18, dtype=torch.float64), torch.zeros(9, 2)):
        with pytest.raises(RuntimeError, match=r"adamw_rows_: steps: found"):
            operators["adamw_rows_"]([Y], steps, sums, grams)
    with pytest.raises(RuntimeError, match=r"memory"):
        operators["riemannian_gradient_rows_"]([Y], [Y], [], sums)


def test_schemas_and_fakes() -> None:
    Y, G, moments = torch.randn(9, 2), torch.randn(9, 2), [torch.rand(9, 2) for _ in range(2)]
    called = BACKENDS["registered"]
    sums = called["gradient_gram"]([G], [Y])
    grams = called["retract_gram"]([G], [Y], [1.0])
    h = torch.tensor([SETTINGS], dtype=torch.float64)
    _, steps = called["adamw_gram_"]([Y], [G], moments[:1], moments[1:], sums, h)
    calls: dict[str, tuple[Any, ...]] = {
        "gradient_gram": ([G], [Y]),
        "riemannian_gradient_rows_": ([G], [Y], [], sums),
        "retract_gram": ([G], [Y], [1.0]),
        "retract_rows_": ([G], [Y], [1.0], sums, grams),
        "adamw_rows_": ([Y], steps, sums, grams),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(called[name].default, arguments)
    tests = ("test_schema", "test_autograd_registration")  # how long the steps are is the implementation's affair
    arguments = ([Y], [G], moments[:1], moments[1:], sums, h)
    torch.library.opcheck(called["adamw_gram_"].default, arguments, test_utils=tests)

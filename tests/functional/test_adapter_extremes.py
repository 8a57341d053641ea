"""The adapter at the ends: not finite, huge and tiny, one row or column, repeated memory, modes that keep no graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from stella_kernels import StellaLinear, stella_adapter, stella_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Apply = Callable[..., Tensor]


def linear(x: Tensor, W: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float = 0.0) -> Tensor:
    return stella_linear(x, W, None, U, S, Vt, scale, p)


def onto(x: Tensor, W: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float = 0.0) -> Tensor:
    return stella_adapter(nn.functional.linear(x, W), x, U, S, Vt, scale, p)


both = pytest.mark.parametrize("apply", [linear, onto])


def problem(T: int, m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """x and W in dtype, and factors in float32 (float64 beside float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    x, W = torch.randn(T, n).to(dtype), (torch.randn(m, n) / math.sqrt(n)).to(dtype)
    return x, [W, *(torch.randn(shape).to(wide).requires_grad_() for shape in ((m, r), (r, r), (r, n)))]


@both
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, value: float, p: float, apply: Apply) -> None:
    """In the output; ∂V sums over the rows, so there it must arrive, and in ∂x it must not."""
    x, rest = problem(150, 7, 37, 3, dtype)
    x[101] = value  # every element, so that some of it is kept under any mask
    x.requires_grad_()
    y = apply(x, *rest, 1.5, p)
    finite = y.isfinite().all(1)
    assert (~finite).nonzero().flatten().tolist() == [101]
    grad_x, _, _, grad_Vt = torch.autograd.grad(y, [x, *rest[1:]], torch.ones_like(y))
    assert bool(grad_x.isfinite().all())
    arrived = ~grad_Vt.isfinite()  # (r, n): where the row was kept
    assert bool(arrived.any())
    assert bool((arrived == arrived[0]).all())
    assert bool(arrived.all()) == (p == 0.0)


@both
def test_a_gradient_that_is_not_finite_stays_in_its_row(apply: Apply) -> None:
    x, rest = problem(150, 7, 37, 3)
    x.requires_grad_()
    grad_y = torch.randn(150, 7)
    grad_y[20, 2] = math.nan
    grad_x, grad_U, grad_S, grad_Vt = torch.autograd.grad(apply(x, *rest, 1.5), [x, *rest[1:]], grad_y)
    assert (~grad_x.isfinite().all(1)).nonzero().flatten().tolist() == [20]
    assert (~grad_U.isfinite().all(1)).nonzero().flatten().tolist() == [2]
    assert not bool(grad_S.isfinite().any())
    assert not bool(grad_Vt.isfinite().any())


@both
@pytest.mark.parametrize("size", [2.0**-20, 2.0**60])
@pytest.mark.parametrize("scale", [1e-25, -3.0, 0.0, 1e15])
def test_huge_and_tiny(scale: float, size: float, apply: Apply) -> None:
    x, (W, U, S, Vt) = problem(60, 9, 33, 4)
    x, W = (x * size).requires_grad_(), torch.zeros_like(W)
    y = apply(x, W, U, S, Vt, scale)
    grad_y = torch.randn(60, 9)
    leaves = [x, U, S, Vt]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = scale * exact[0] @ exact[3].mT @ exact[2].mT @ exact[1].mT
    pairs = [(y, wanted)]
    pairs += zip(
        torch.autograd.grad(y, leaves, grad_y), torch.autograd.grad(wanted, exact, grad_y.double()), strict=True
    )
    for found, right in pairs:
        # three products of sums of at most 60 terms; random factors amplify by their condition, some tens
        error = float((found.double() - right).detach().norm())
        assert error <= 3 * 60 * 10 * torch.finfo(torch.float32).eps * float(right.detach().norm())


@both
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 40, 1), (40, 1, 9, 1), (3, 300, 1, 1), (1, 5, 5, 5), (9, 3, 300, 3)]
)
def test_one_row_one_column_and_full_rank(shape: tuple[int, int, int, int], apply: Apply) -> None:
    x, rest = problem(*shape, torch.float64)
    x.requires_grad_()
    W, U, S, Vt = rest
    grad_y = torch.randn(shape[:2], dtype=torch.float64)
    leaves = [x, *rest[1:]]
    found = torch.autograd.grad(apply(x, *rest, 0.5), leaves, grad_y)
    wanted = torch.autograd.grad(x @ W.mT + 0.5 * x @ Vt.mT @ S.mT @ U.mT, leaves, grad_y)
    for a, b in zip(found, wanted, strict=True):
        # sums of at most 300 terms in three products
        assert float((a - b).norm()) <= 900 * torch.finfo(torch.float64).eps * (float(b.norm()) + 1.0)


@both
@pytest.mark.parametrize("lead", [(4, 3), (5,), (2, 3, 2, 2)])
def test_expanded_input_and_gradient(lead: tuple[int, ...], apply: Apply) -> None:
    row, rest = problem(1, 7, 11, 3)
    row.requires_grad_()
    y = apply(row[0].expand(*lead, 11), *rest, 0.5)
    leaves = [row, *rest[1:]]
    found = torch.autograd.grad(y.sum(), leaves)  # an expanded one
    wanted = torch.autograd.grad(apply(row, *rest, 0.5).sum() * math.prod(lead), leaves)
    for a, b in zip(found, wanted, strict=True):
        # sums of at most 24 terms in three products, another order
        assert float((a - b).norm()) <= 3 * 24 * torch.finfo(torch.float32).eps * (float(b.norm()) + 1.0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@both
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(apply: Apply) -> None:
    """No operator refuses, empty results are filled with NaN first, and every run gives the same bits."""
    x, rest = problem(300, 130, 97, 5)
    x.requires_grad_()
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        y = apply(x, *rest, 0.5, 0.3)
        runs.append((y, *torch.autograd.grad(y, [x, *rest[1:]], torch.ones_like(y))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert all(bool(t.isfinite().all()) for t in runs[0])


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_a_graph(mode: Callable[..., object], hooked: bool) -> None:
    base = nn.Linear(11, 7)
    if hooked:
        base.register_forward_hook(lambda module, args, output: None)
    layer, x = StellaLinear(base, r=3, dropout=0.3), torch.randn(2, 5, 11, requires_grad=True)
    for training in (False, True):
        layer.train(training)
        torch.manual_seed(1)
        wanted = layer(x).detach()
        torch.manual_seed(1)
        with mode():  # type: ignore[attr-defined]
            found = layer(x)
        assert not found.requires_grad
        assert torch.equal(found, wanted)


@both
def test_one_graph_twice_is_bitwise_the_same(apply: Apply) -> None:
    x, rest = problem(150, 40, 37, 3)
    leaves = [x.requires_grad_(), *rest[1:]]
    y = apply(x, *rest, 0.5, 0.4)
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y.square().sum(), leaves), strict=True))


@both
@pytest.mark.parametrize("index", [0, 2, 3, 4])
def test_changing_what_backward_needs_is_an_error(index: int, apply: Apply) -> None:
    x, rest = problem(15, 7, 11, 3)
    tensors = [t.detach().requires_grad_() for t in (x, *rest)]
    y = apply(*tensors, 0.5)
    with torch.no_grad():
        tensors[index].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

"""What ``attach`` refuses, changing nothing: targets, arguments, steps, and what an optimizer or a retraction left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stella_kernels.checks import NonFiniteError
from stella_kernels.nn import StiefelFactor, stiefel_factors
from stella_kernels.optim import attach
from stella_kernels.reference import stiefel
from tests.optim.stiefel_problem import (
    F64,
    HIDDEN,
    OPTIMIZERS,
    Model,
    Problem,
    distance,
    hooked,
    identical,
    published,
    values,
    worst_error,
)
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")


# --- refused at attach ---


def optimizer_of(*parameters: Tensor) -> Optimizer:
    return SGD([{"params": list(parameters)}], lr=0.1)


def spoiled(value: float) -> nn.Parameter:
    Q = orthonormal(6, 2)
    Q[3, 1] = value
    return nn.Parameter(Q)


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not orthonormal": (
        lambda: [nn.Parameter(1.1 * orthonormal(6, 2))],
        ValueError,
        r"target\[0\]: found columns with ‖QᵀQ − I‖ = 0\.297, wanted at most .*polar",  # (1.1² − 1) sqrt(2)
    ),
    "nearly orthonormal": (
        lambda: [nn.Parameter((1 + 1e-4) * orthonormal(600, 8, dtype=torch.float32))],
        ValueError,
        r"‖QᵀQ − I‖",
    ),
    "NaN": (lambda: [spoiled(math.nan)], NonFiniteError, r"target\[0\] held NaN"),
    "infinity": (lambda: [spoiled(math.inf)], NonFiniteError, r"target\[0\] held NaN or an infinity"),
    "integers": (lambda: [frozen(torch.eye(4, 2).long())], TypeError, r"target\[0\]: found dtype torch\.int64"),
    "complex": (lambda: [nn.Parameter(torch.eye(4, 2).to(torch.complex64))], TypeError, "found dtype torch.complex64"),
    "wide parameter": (lambda: [nn.Parameter(orthonormal(6, 2).mT)], ValueError, r"\(2, 6\).*StiefelFactor"),
    "square parameter": (lambda: [nn.Parameter(orthonormal(3, 3))], ValueError, r"\(3, 3\).*which side"),
    "wide factor": (
        lambda: [StiefelFactor(nn.Parameter(orthonormal(6, 2).mT), False, "a.Vt")],
        ValueError,
        r"a\.Vt: found shape \(2, 6\) with transposed=False.*transposed=True",
    ),
    "vector": (lambda: [nn.Parameter(torch.ones(4))], ValueError, r"target\[0\]: found shape \(4,\)"),
    "batch": (lambda: [nn.Parameter(torch.ones(2, 4, 2))], ValueError, r"found shape \(2, 4, 2\)"),
    "meta device": (lambda: [nn.Parameter(torch.empty(4, 2, device="meta"))], ValueError, "on device meta"),
    "plain tensor": (lambda: [orthonormal(6, 2)], TypeError, r"target\[0\]: found Tensor"),
    "one parameter": (lambda: nn.Parameter(orthonormal(6, 2)), TypeError, "put a single factor in a list"),
    "a number": (lambda: 3, TypeError, "target: found int"),
    "nothing": (list, ValueError, "empty sequence"),
    "no adapters": (lambda: nn.Linear(3, 3), ValueError, "Linear has no trainable Stiefel factors"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_bad_targets_are_refused(case: str) -> None:
    make, error, message = REFUSED[case]
    target = make()
    given = list(target) if isinstance(target, list) else []
    parameters = [getattr(t, "parameter", t) for t in given]
    good = nn.Parameter(orthonormal(5, 2))
    optimizer = optimizer_of(good, *(p for p in parameters if isinstance(p, nn.Parameter)))
    with pytest.raises(error, match=message):
        attach(optimizer, [*target, good] if given else target, grad_scaling=False)
    good.grad = torch.ones_like(good)
    expected = good.detach() - 0.1
    for p in parameters:  # and the optimizer is as it was: one bare step moves the sound factor
        p.grad = None
    optimizer.step()
    assert torch.equal(good.detach(), expected)


def test_bad_arguments_are_refused() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    for kwargs, error, message in [
        ({"retraction": "svd"}, ValueError, "retraction: found 'svd', wanted one of 'polar'"),
        ({"geometry": "flat"}, ValueError, "geometry: found 'flat', wanted one of 'stiefel', 'euclidean', 'quotient'"),
        ({"method": "fast"}, ValueError, "method: found 'fast'"),
        ({"grad_scaling": 0}, ValueError, "grad_scaling: found 0"),
        ({"grad_scaling": math.nan}, ValueError, "grad_scaling: found nan"),
        ({"grad_scaling": "yes"}, TypeError, "grad_scaling: found str"),
    ]:
        with pytest.raises(error, match=message):
            attach(optimizer, model, **kwargs)
    with pytest.raises(TypeError, match="optimizer: found Model"):
        attach(model, optimizer)  # type: ignore[arg-type]
    factors = stiefel_factors(model)
    with pytest.raises(ValueError, match=r"item 2 .*same parameter as item 0"):
        attach(optimizer, [*factors[:2], factors[0]], grad_scaling=False)


def test_parameters_that_the_optimizer_does_not_hold_are_named() -> None:
    model = Model()
    optimizer = SGD([model.first.U, model.second.U, model.second.S], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer: it does not hold first\.Vt, second\.Vt"):
        attach(optimizer, model)


def test_weight_decay_on_a_factor_is_refused() -> None:
    model = Model()
    with pytest.raises(
        ValueError, match=r"group 0 has weight_decay=0\.01 and holds the constrained first\.U, first\.Vt"
    ):
        attach(AdamW(model.parameters()), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "r"), [(4096, 16), (8, 8), (64, 1)])
def test_factors_rounded_to_their_dtype_are_accepted(n: int, r: int, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(orthonormal(n, r, dtype=dtype))
    attach(optimizer_of(parameter), [StiefelFactor(parameter, False, "U")], grad_scaling=False)


# --- refused at a step ---


def before_a_step() -> tuple[Problem, Model, Optimizer, Tensor]:
    """A model with gradients, its optimizer attached to, and a copy of the gradient of ``first.U``."""
    problem = Problem()
    model = problem.copy()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    attach(optimizer, model)
    problem.loss(model, 0).backward()
    assert model.first.U.grad is not None
    return problem, model, optimizer, model.first.U.grad.clone()


def test_weight_decay_set_later_is_refused() -> None:
    problem, model, optimizer, gradient = before_a_step()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 and holds the constrained first\.U"):
        optimizer.step()
    assert identical(values(model), values(problem.model))
    assert torch.equal(model.first.U.grad, gradient)
    assert not optimizer.state
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_non_finite_gradient_stops_everything(mixed: bool, value: float) -> None:
    """Nothing moves, no gradient is rewritten, the optimizer's state stays empty; also with several operator calls."""
    problem = Problem()
    model = problem.copy()
    if mixed:
        model.first.float()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.second.Vt.grad[2, 5] = value  # type: ignore[index]
    before, gradients = values(model), {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    attach(optimizer, model)
    with pytest.raises(NonFiniteError, match=r"the gradient of second\.Vt holds NaN") as caught:
        optimizer.step()
    assert caught.value.names == ("second.Vt",)
    assert identical(values(model), before)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, gradients[name]) or name == "second.Vt"  # type: ignore[arg-type]
    assert torch.equal(model.second.Vt.grad.nan_to_num(), gradients["second.Vt"].nan_to_num())  # type: ignore[union-attr]
    assert not optimizer.state


def test_sparse_gradients_are_refused() -> None:
    table = nn.Parameter(orthonormal(8, 3))
    optimizer = SGD([table], lr=0.1)
    attach(optimizer, [table], grad_scaling=False)
    nn.functional.embedding(torch.tensor([1, 2]), table, sparse=True).sum().backward()
    before = table.detach().clone()
    with pytest.raises(RuntimeError, match=r"target\[0\]: found a gradient of layout torch\.sparse_coo"):
        optimizer.step()
    assert torch.equal(table.detach(), before)


def test_gradients_whose_elements_share_memory_are_refused() -> None:
    factor = nn.Parameter(orthonormal(8, 3))
    optimizer = SGD([factor], lr=0.1)
    attach(optimizer, [factor], grad_scaling=False)
    factor.grad = torch.ones(1, 1, dtype=factor.dtype).expand(8, 3)
    before = factor.detach().clone()
    with pytest.raises(RuntimeError, match=r"target\[0\]: found a gradient of strides \(0, 0\)"):
        optimizer.step()
    assert torch.equal(factor.detach(), before)
    assert torch.equal(factor.grad, torch.ones_like(factor.grad))


class Misbehaving(SGD):
    """Plain gradient descent that can be told to write a NaN, to raise halfway, or to skip as a fused one does."""

    spoil: Tensor | None = None
    fail = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.fail:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise OSError("lost")
        if getattr(self, "found_inf", None) is not None:
            return
        super().step()
        if self.spoil is not None:
            with torch.no_grad():
                self.spoil[0, 0] = math.nan


@pytest.mark.parametrize("retraction", sorted(stiefel.RETRACTIONS))
def test_factors_come_back_when_the_optimizer_writes_nan(retraction: str) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = Misbehaving(model.parameters(), lr=0.1)
    attach(optimizer, model, retraction=retraction)
    problem.train(model, optimizer, optimizer.step, 0, 2)
    before = values(model)
    optimizer.spoil = model.second.U
    problem.loss(model, 0).backward()
    with pytest.raises(NonFiniteError, match=r"optimizer\.step\(\) moved second\.U to NaN") as caught:
        optimizer.step()
    assert caught.value.names == ("second.U",)
    after = values(model)
    assert all(torch.equal(after[f.name], before[f.name]) for f in stiefel_factors(model))
    optimizer.spoil = None
    problem.train(model, optimizer, optimizer.step, 2, 4)
    assert worst_error(model) < 1e-13


@pytest.mark.parametrize("how", ["status", "exception"])
def test_factors_come_back_when_the_retraction_fails(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    model = problem.copy()
    before = values(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)

    def failing(moved: list[Tensor], *args: Any) -> Tensor:
        for m in moved:
            m.zero_()
        if how == "exception":
            raise RuntimeError("out of memory")
        info = torch.zeros(len(moved), 5, dtype=F64)
        info[1, 0] = 2
        return info

    monkeypatch.setattr(torch.ops.stella_kernels, "project_retract_", failing)
    problem.loss(model, 0).backward()
    message = r"method='auto' did not converge for first\.Vt\." if how == "status" else "out of memory"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    after = values(model)
    assert all(torch.equal(after[f.name], before[f.name]) for f in stiefel_factors(model))


def test_a_step_that_calls_the_step_it_overrides_is_one_step() -> None:
    """torch then fires the hooks twice; the gradient must be made Riemannian once, and the whole move retracted."""

    class Inner(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()

    class Outer(Inner):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(1.1)
            super().step()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.9)

    class Once(Optimizer):
        """The same arithmetic in one step."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.copy_((p * 1.1 - 0.1 * p.grad) * 0.9)

    problem = Problem()
    Inner([torch.zeros(1)], lr=0.1)  # torch hooks the step of a class when it is first instantiated
    SGD([torch.zeros(1)], lr=0.1)
    expected = published(problem, Once, 5, F64, hidden_size=HIDDEN)
    model, _ = hooked(problem, lambda p: Outer(p, lr=0.1), 5, F64)
    assert distance(values(model), values(expected)) < 1e-12


def test_an_optimizer_that_raises_leaves_nothing_stale() -> None:
    """After the failure the factors are set to a new point: the next step must start there, not from the snapshot."""
    problem = Problem()
    model = problem.copy()
    optimizer = Misbehaving(model.parameters(), lr=0.1)
    attach(optimizer, model)
    optimizer.fail = True
    problem.loss(model, 0).backward()
    with pytest.raises(OSError, match="lost"):
        optimizer.step()
    optimizer.fail = False
    fresh = Problem()
    model.load_state_dict(fresh.model.state_dict())
    optimizer.found_inf = torch.ones(())  # a step that a GradScaler has skipped ends without having begun
    optimizer.step()
    assert identical(values(model), values(fresh.model))
    del optimizer.found_inf
    fresh.train(model, optimizer, optimizer.step, 0, 3)
    expected, _ = hooked(fresh, lambda p: SGD(p, lr=0.1), 3, F64)
    assert identical(values(model), values(expected))


def test_nan_in_one_attachment_leaves_the_gradients_of_another() -> None:
    factors = [nn.Parameter(orthonormal(12, 3, dtype=torch.float32)) for _ in range(2)]
    optimizer = torch.optim.SGD(factors, lr=0.1)
    for factor in factors:
        attach(optimizer, [factor], grad_scaling=False)
        factor.grad = torch.randn(12, 3)
    factors[1].grad[4, 1] = float("nan")
    before = factors[0].grad.clone()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    assert torch.equal(factors[0].grad, before)

"""Whoever moves a factor: it is orthonormal after the step, or an error has said so and nothing was half-changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stella_kernels import StellaLinear
from stella_kernels.checks import OffManifoldError
from stella_kernels.nn import orthonormality_tolerance, stiefel_factors
from stella_kernels.optim import StellaAdamW, attach, retract
from tests.optim.stiefel_problem import Model, Problem, identical, values

PLAIN = {"lr": 1e-2, "grad_scaling": False}
GROUPS = {"lr": 1e-2, "weight_decay": 0.0}


def attached(model: nn.Module, make: Any = AdamW, **kwargs: Any) -> Optimizer:
    optimizer = make(model.parameters(), **(GROUPS if make is AdamW else {"lr": 1e-2}))
    attach(optimizer, model, grad_scaling=False, **kwargs)
    return optimizer


def fused(model: nn.Module, **kwargs: Any) -> Optimizer:
    return StellaAdamW(model, weight_decay=0.0, **PLAIN, **kwargs)


BUILDERS = {"attach": attached, "fused": fused}


def train(problem: Problem, model: Model, optimizer: Optimizer, first: int, last: int) -> None:
    problem.train(model, optimizer, optimizer.step, first, last)


def off(model: nn.Module) -> float:
    """The largest distance of a factor from its manifold, over what is round-off for it."""
    return max(
        float((f.view.mT @ f.view - torch.eye(f.view.shape[1], dtype=f.view.dtype)).norm())
        / orthonormality_tolerance(f)
        for f in stiefel_factors(model)
    )


def by_copy(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def by_data(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value)


def by_rebinding(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.clone()


WRITES = [by_copy, by_data, by_rebinding]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["first.U", "second.Vt"])
def test_a_move_between_two_steps_is_an_error_that_names_the_factor(
    build: str, write: Callable[[Tensor, Tensor], None], name: str
) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = BUILDERS[build](model)
    train(problem, model, optimizer, 0, 3)
    parameter = dict(model.named_parameters())[name]
    write(parameter, parameter.detach() + 1e-3 * torch.randn_like(parameter))
    before, state = values(model), [s["exp_avg"].clone() for s in optimizer.state.values()]
    optimizer.zero_grad()
    problem.loss(model, 3).backward()
    with pytest.raises(OffManifoldError, match=rf"{name}: found .*something other than .*retract\(model\)") as caught:
        optimizer.step()
    assert caught.value.names == (name,)
    if build == "fused" and write is by_data:  # known when the step is taken, and so taken in full
        assert "taken in full" in str(caught.value)
        assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}
        assert off(model) < 1
    else:
        assert identical(values(model), before)
        assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(state, optimizer.state.values(), strict=True))
        retract(model)
    train(problem, model, optimizer, 4, 6)  # the cure that the message names
    assert off(model) < 1


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("write", WRITES)
def test_retract_goes_on_from_the_polar_factor(build: str, write: Callable[[Tensor, Tensor], None]) -> None:
    problem = Problem()
    moved, retracted = problem.copy(), problem.copy()
    results = []
    for model, beforehand in ((moved, False), (retracted, True)):
        torch.manual_seed(1)
        optimizer = BUILDERS[build](model, on_foreign_move="retract")
        train(problem, model, optimizer, 0, 3)
        for factor in stiefel_factors(model):
            write(factor.parameter, factor.parameter.detach() + 0.05 * torch.randn_like(factor.parameter))
        if beforehand:
            retract(model)
        optimizer.zero_grad()
        # the same gradients for both: those of a point are not those of its polar factor
        for p, g in zip(model.parameters(), problem_gradients(problem, model), strict=True):
            p.grad = g
        optimizer.step()
        assert off(model) < 1
        results.append(values(model))
    if build == "fused" or write is not by_data:  # else the gradient was made Riemannian where the factor was found
        assert all(torch.allclose(results[0][name], results[1][name], atol=1e-12) for name in results[0])


def problem_gradients(problem: Problem, model: Model) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in model.parameters()]


@pytest.mark.parametrize("build", BUILDERS)
def test_what_is_moved_along_the_manifold_is_no_fault(build: str) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = BUILDERS[build](model)
    train(problem, model, optimizer, 0, 2)
    with torch.no_grad():
        for factor in stiefel_factors(model):
            factor.view.copy_(torch.linalg.qr(torch.randn_like(factor.view)).Q)
    train(problem, model, optimizer, 2, 4)
    assert off(model) < 1


class Rebinding(SGD):
    """Exchanges the memory of its parameters as it steps, as ``vector_to_parameters`` and offloads do."""

    layout = staticmethod(lambda p: p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.layout(p.data - group["lr"] * p.grad)


def column_major(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT


@pytest.mark.parametrize("geometry", ["stiefel", "quotient"])
@pytest.mark.parametrize("retraction", ["polar", "qr", "exp_map", "cayley"])
@pytest.mark.parametrize("layout", [lambda value: value, column_major], ids=["same strides", "other strides"])
def test_memory_that_is_exchanged_within_the_step(geometry: str, retraction: str, layout: Any) -> None:
    ours, theirs = ([StellaLinear(nn.Linear(13, 17, dtype=torch.float64), r=4)] for _ in range(2))
    ours[0].load_state_dict(theirs[0].state_dict())
    x = torch.randn(5, 13, dtype=torch.float64)
    for (layer,), make in ((ours, Rebinding), (theirs, SGD)):
        optimizer = make([layer.U, layer.S, layer.Vt], lr=0.01)
        if make is Rebinding:
            optimizer.layout = layout
        attach(optimizer, layer, grad_scaling=False, geometry=geometry, retraction=retraction)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    for name in ("U", "S", "Vt"):  # float32 masters; three steps of an order of summation each
        assert torch.allclose(getattr(ours[0], name), getattr(theirs[0], name), atol=1e-5)
    assert off(ours[0]) < (1 if retraction in ("polar", "qr") else 10)


def test_memory_that_is_exchanged_within_a_step_that_fails_is_given_the_old_values() -> None:
    layer = StellaLinear(nn.Linear(13, 17), r=4)
    optimizer = Rebinding([layer.U, layer.S, layer.Vt], lr=0.05)
    attach(optimizer, layer, grad_scaling=False)
    optimizer.layout = lambda value: torch.full_like(value, torch.nan)
    before = layer.U.detach().clone()
    layer(torch.randn(5, 13)).square().sum().backward()
    with pytest.raises(RuntimeError, match="put back to their values"):
        optimizer.step()
    assert torch.equal(layer.U, before)


def test_shape_that_was_taken_away() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = attached(model)
    train(problem, model, optimizer, 0, 1)
    model.first.U.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(OffManifoldError, match=r"first\.U: found shape \(0,\).*wanted \(17, 4\).*offload"):
        optimizer.step()


class Averaging(Optimizer):
    """Interpolates the parameters with slow ones after every second step of the optimizer inside."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inside = inner
        self.slow = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inside.step()
        self.taken += 1
        if self.taken % 2 == 0:
            for p, slow in self.slow.items():
                p.copy_(slow.lerp_(p, 0.5))


def test_a_wrapper_that_averages_is_retracted_after_its_own_move() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = Averaging(AdamW(model.parameters(), **GROUPS))
    attach(optimizer, model, grad_scaling=False)
    for step in range(6):
        train(problem, model, optimizer, step, step + 1)
        assert off(model) < 1


def test_a_wrapper_around_the_attached_optimizer_is_found_at_the_next_step() -> None:
    problem = Problem()
    for policy, error in (("error", True), ("retract", False)):
        model = problem.copy()
        inner = fused(model, on_foreign_move=policy)
        optimizer = Averaging(inner)
        train(problem, model, optimizer, 0, 2)
        assert off(model) > 100  # the wrapper has moved them last
        if error:
            with pytest.raises(OffManifoldError, match="averages or interpolates"):
                train(problem, model, optimizer, 2, 3)
        else:
            train(problem, model, optimizer, 2, 3)
            assert off(model) < 1


class Unhooked(Optimizer):
    """A wrapper that never ran ``Optimizer.__init__``."""

    def __init__(self, inner: Optimizer) -> None:
        self.inside = inner
        self.param_groups = inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inside.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inside.step()


def test_a_wrapper_without_hooks_hands_them_to_the_optimizer_inside() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = Unhooked(AdamW(model.parameters(), **GROUPS))
    attach(optimizer, model, grad_scaling=False)
    train(problem, model, optimizer, 0, 2)
    assert off(model) < 1
    optimizer.inside = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"optimizer: found Unhooked, which never ran .*__init__"):
        attach(optimizer, model, grad_scaling=False)


class Sharpness(Optimizer):
    """Two ways to step, as SAM has them: one climbs, the other goes back and lets the inner optimizer step."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.base = inner
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.old[p] = p.detach().clone()
                p.add_(0.01 * p.grad)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, value in self.old.items():
            p.data = value
        self.base.step()


def test_a_second_way_to_step_is_seen_by_the_optimizer_inside() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = Sharpness(SGD(model.parameters(), lr=1e-2))
    attach(optimizer, model, grad_scaling=False)
    for step in range(3):
        optimizer.zero_grad()
        problem.loss(model, step).backward()
        optimizer.first_step()
        optimizer.zero_grad()
        problem.loss(model, step).backward()
        optimizer.second_step()
        assert off(model) < 1


class InBackward(Optimizer):
    """Steps as each gradient is done, and has nothing left to do in ``step``."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self.update)

    @torch.no_grad()
    def update(self, p: Tensor) -> None:
        p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
        p.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(("lr", "kind"), [(0.5, OffManifoldError), (0.0, RuntimeError)])
def test_steps_inside_backward_are_an_error(lr: float, kind: type[Exception]) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = InBackward(model.parameters(), lr)
    attach(optimizer, model, grad_scaling=False)

    def five_steps() -> None:
        for step in range(5):
            problem.loss(model, step).backward()
            optimizer.step()

    with pytest.raises(kind, match=r"(steps inside backward|LOMO)"):
        five_steps()

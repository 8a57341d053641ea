"""What the optimizer holds changes: unfreezing, groups, parameters that are exchanged; copies; interruptions."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from stella_kernels import StellaLinear
from stella_kernels.checks import NonFiniteError
from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW, attach
from tests.optim.stiefel_problem import Problem, identical, values
from tests.optim.test_foreign_moves import BUILDERS, GROUPS, attached, fused, off, train


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("added", [False, True])
def test_a_layer_that_is_unfrozen_later_is_constrained(build: str, added: bool) -> None:
    problem = Problem()
    model = problem.copy()
    early, late = list(model.second.parameters()), list(model.first.parameters())
    for p in late:
        p.requires_grad_(False)
    parameters = early if added else early + late
    if build == "attach":
        optimizer: Optimizer = AdamW(parameters, **GROUPS)
        attach(optimizer, model, grad_scaling=False)
    else:
        optimizer = StellaAdamW(parameters, factors=model, grad_scaling=False, **GROUPS)
    for step in range(6):
        if step == 2:
            for p in late:
                p.requires_grad_(True)
            if added:
                optimizer.add_param_group({"params": late})
        train(problem, model, optimizer, step, step + 1)
        assert off(model) < 1
    assert len(stiefel_factors(model)) == 4


@pytest.mark.parametrize("build", BUILDERS)
def test_a_layer_that_is_unfrozen_off_its_manifold_is_an_error(build: str) -> None:
    problem = Problem()
    model = problem.copy()
    model.first.U.requires_grad_(False).mul_(2)
    optimizer: Optimizer = AdamW(model.parameters(), **GROUPS)
    if build == "attach":
        attach(optimizer, model, grad_scaling=False)
    else:
        optimizer = StellaAdamW(model.parameters(), factors=model, grad_scaling=False, **GROUPS)
    train(problem, model, optimizer, 0, 1)
    model.first.U.requires_grad_(True)
    before = values(model)
    with pytest.raises(ValueError, match=r"first\.U: found columns with"):
        train(problem, model, optimizer, 1, 2)
    assert identical(values(model), before)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_parameter_that_was_exchanged_in_model_and_groups_is_an_error(build: str) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = BUILDERS[build](model)
    train(problem, model, optimizer, 0, 1)
    old, new = model.first.U, nn.Parameter(model.first.U.detach().clone())
    model.first.U = new
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    with pytest.raises(ValueError, match=r"first\.U of the model is another parameter now"):
        train(problem, model, optimizer, 1, 2)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("others", [False, True])
def test_an_optimizer_of_another_models_parameters_never_moves_them(build: str, others: bool) -> None:
    problem = Problem()
    model, forgotten = problem.copy(), problem.copy()
    optimizer = BUILDERS[build](forgotten)
    if others:
        optimizer.add_param_group({"params": [model.first.S], "weight_decay": 0.0})
    with pytest.raises(RuntimeError, match=r"no gradient was found in any of the 4 constrained factors"):
        train(problem, model, optimizer, 0, 3)


def test_a_step_before_the_first_backward_is_none() -> None:
    model = Problem().copy()
    for build in BUILDERS.values():
        optimizer = build(model)
        optimizer.step()  # as schedulers are warmed up
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
        optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("build", BUILDERS)
def test_copies_keep_the_geometry(build: str, copied: Any) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = BUILDERS[build](model)
    train(problem, model, optimizer, 0, 2)
    other, its_optimizer = copied((model, optimizer))
    for m, o in ((model, optimizer), (other, its_optimizer)):
        train(problem, m, o, 2, 5)
        assert off(m) < 1
    assert identical(values(model), values(other))


def test_a_detached_optimizer_is_copied_plainly() -> None:
    model = Problem().copy()
    optimizer = AdamW(model.parameters(), **GROUPS)
    attachment = attach(optimizer, model, grad_scaling=False)
    attachment.remove()
    assert not copy.deepcopy(optimizer)._optimizer_step_pre_hooks


def layer_of(problem: Problem) -> StellaLinear:
    torch.manual_seed(0)
    return StellaLinear(nn.Linear(13, 9, dtype=torch.float64), r=3)


def closure_of(problem: Problem, layer: nn.Module, optimizer: Optimizer, index: int) -> Any:
    def closure() -> Any:
        optimizer.zero_grad()
        x, target = problem.batches[index]
        loss = (layer(x) - target).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("geometry", ["stiefel", "quotient"])
def test_a_closure_is_the_same_step_bit_for_bit(keyword: bool, geometry: str) -> None:
    problem = Problem()
    ours, theirs = layer_of(problem), layer_of(problem)
    kwargs = {"grad_scaling": False, "geometry": geometry}
    optimizer, other = (AdamW([m.U, m.S, m.Vt], **GROUPS) for m in (ours, theirs))
    attach(optimizer, ours, **kwargs)
    attach(other, theirs, **kwargs)
    for index in range(3):
        closure = closure_of(problem, ours, optimizer, index)
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert float(loss.detach()) == float(closure_of(problem, theirs, other, index)().detach())
        other.step()
    assert identical(values(ours), values(theirs))


def test_a_closure_that_is_evaluated_where_a_factor_has_moved_is_refused() -> None:
    problem = Problem()
    model = layer_of(problem)
    optimizer = torch.optim.LBFGS([model.U, model.S, model.Vt], lr=0.1, max_iter=4)
    attach(optimizer, model, grad_scaling=False)
    before = {f.name: f.view.clone() for f in stiefel_factors(model)}
    with pytest.raises(RuntimeError, match=r"closure: it was evaluated a second time .*LBFGS"):
        optimizer.step(closure_of(problem, model, optimizer, 0))
    assert all(torch.equal(f.view, before[f.name]) for f in stiefel_factors(model))


class Interrupted(SGD):
    """Sends itself a signal, or raises, when the first parameter has moved."""

    act: Any = staticmethod(lambda: None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for index, p in enumerate(self.param_groups[0]["params"]):
            p.sub_(p.grad, alpha=0.05)
            if index == 0:
                self.act()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass  # a handler runs between two instructions


@pytest.fixture(autouse=True)
def _own_handler() -> Iterator[None]:
    """Of a step that raised, a handler stays until the next step or signal."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_waits_for_the_retraction() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = Interrupted(model.parameters(), lr=0.05)
    attach(optimizer, model, grad_scaling=False)
    optimizer.act = interrupt
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(problem, model, optimizer, 0, 1)
    assert off(model) < 1
    assert signal.getsignal(signal.SIGINT) == handler


def test_two_attachments_wait_for_both_retractions() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = Interrupted(model.parameters(), lr=0.05)
    for part in (model.first, model.second):
        attach(optimizer, part, grad_scaling=False)
    optimizer.act = interrupt
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(problem, model, optimizer, 0, 1)
    assert off(model) < 1
    assert signal.getsignal(signal.SIGINT) == handler


def test_what_an_optimizer_moved_before_it_raised_is_retracted_by_the_next_step() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = Interrupted(model.parameters(), lr=0.05)
    attach(optimizer, model, grad_scaling=False)

    def fail() -> None:
        raise MemoryError

    optimizer.act = fail
    with pytest.raises(MemoryError):
        train(problem, model, optimizer, 0, 1)
    optimizer.act = lambda: None
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # no step is under way: at once
        interrupt()
    with pytest.warns(RuntimeWarning, match=r"the last one raised, .* moved first\.U"):
        train(problem, model, optimizer, 1, 2)
    assert off(model) < 1
    assert handler is not None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_of_the_fused_step_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = fused(model)
    take = type(optimizer)._step_factors

    def stopped(self: Any, *given: Any) -> Any:
        result = take(self, *given)
        interrupt()
        return result

    monkeypatch.setattr(StellaAdamW, "_step_factors", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(problem, model, optimizer, 0, 1)
    assert off(model) < 1
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert len(optimizer.state) == 6  # S too


@pytest.mark.parametrize("build", BUILDERS)
def test_a_non_finite_gradient_of_s_alone_is_named(build: str) -> None:
    layer = StellaLinear(nn.Linear(13, 17), r=4)
    optimizer: Optimizer = AdamW([layer.U, layer.S, layer.Vt], **GROUPS)
    if build == "attach":
        attach(optimizer, layer, grad_scaling=False)
    else:
        optimizer = StellaAdamW(layer, grad_scaling=False, **GROUPS)
    layer(torch.randn(5, 13)).square().sum().backward()
    layer.S.grad[0, 1] = torch.inf
    before = values(layer)
    with pytest.raises(NonFiniteError, match="the gradient of the S beside"):
        optimizer.step()
    assert identical(values(layer), before)


def test_a_skipped_step_is_skipped_whole() -> None:
    layer = StellaLinear(nn.Linear(13, 17), r=4)
    optimizer = StellaAdamW(layer, grad_scaling=False, skip_nonfinite=True, **GROUPS)
    x = torch.randn(5, 13)
    for where in ("U", "S", "Vt", None):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        before = values(layer)
        if where is not None:
            getattr(layer, where).grad[0, 0] = torch.nan
        optimizer.step()
        assert identical(values(layer), before) == (where is not None)
    assert optimizer.skipped == {"U": 1, "S beside U": 1, "Vt": 1}
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_tensors_are_made_where_they_belong_whatever_the_default_device() -> None:
    problem = Problem()
    for build in (attached, fused):
        model = problem.copy()
        optimizer = build(model)
        train(problem, model, optimizer, 0, 1)
        problem.loss(model, 1).backward()
        torch.set_default_device("meta")
        try:
            optimizer.step()
        finally:
            torch.set_default_device(None)
        assert off(model) < 1

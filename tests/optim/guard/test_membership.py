"""Which parameters are the model's factors: frozen ones, copies, targets that are gone, replaced parameters."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from stella_kernels import StellaLinear
from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW, attach, retract
from tests.optim.stiefel_problem import Model, Problem
from tests.optim.test_foreign_moves import GROUPS, off

KINDS = ["attach", "fused"]


def optimizer_of(kind: str, parameters: Any, target: Any) -> Optimizer:
    if kind == "fused":
        return StellaAdamW(parameters, factors=target, grad_scaling=False, **GROUPS)
    optimizer = AdamW(parameters, **GROUPS)
    attach(optimizer, target, grad_scaling=False)
    return optimizer


def parts(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return list(model.first.parameters()), list(model.second.parameters())


def freeze(parameters: list[nn.Parameter], frozen: bool = True) -> None:
    for p in parameters:
        p.requires_grad_(not frozen)


def steps(problem: Problem, model: nn.Module, optimizer: Optimizer, count: int, to_none: bool = True) -> None:
    for step in range(count):
        optimizer.zero_grad(set_to_none=to_none)
        problem.loss(model, step).backward()  # type: ignore[arg-type]
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True], ids=["a module of one's own", "StellaLinear"])
def test_a_frozen_factor_with_a_gradient_is_moved_on_its_manifold(kind: str, own: bool) -> None:
    problem = Problem()
    model: Any = problem.copy()
    if own:
        model.first, model.second = (StellaLinear(nn.Linear(m, n), r=4).double() for m, n in ((13, 17), (17, 9)))
        retract(model)
    problem.loss(model, 0).backward()
    early, late = [[m.U, m.S, m.Vt] for m in (model.first, model.second)]
    freeze(early)
    optimizer = optimizer_of(kind, early + late, model)
    before = model.first.U.detach().clone()
    optimizer.step()
    assert not torch.equal(model.first.U, before)  # as torch's optimizers do
    assert off(model) < 1
    steps(problem, model, optimizer, 2, to_none=False)
    freeze(early, False)
    steps(problem, model, optimizer, 3)
    assert len(stiefel_factors(model)) == 4
    assert off(model) < 1


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy, the optimizer first": lambda both: copy.deepcopy(both[::-1])[::-1],
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_constrains_what_is_unfrozen_later(kind: str, copied: str) -> None:
    problem = Problem()
    model = problem.copy()
    early, late = parts(model)
    freeze(early)
    both = COPIES[copied]((model, optimizer_of(kind, early + late, model)))
    both = COPIES[copied](both)  # a copy of a copy
    model, optimizer = both
    freeze(parts(model)[0], False)
    steps(problem, model, optimizer, 4)
    assert off(model) < 1


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_constrains_what_is_added_later_or_refuses_it(kind: str, copied: str) -> None:
    problem = Problem()
    model = problem.copy()
    freeze(parts(model)[0])
    model, optimizer = COPIES[copied]((model, optimizer_of(kind, parts(model)[1], model)))
    model.first = Problem().copy().first  # type: ignore[assignment]
    if copied == "deepcopy":
        optimizer.add_param_group({"params": parts(model)[0]})
        steps(problem, model, optimizer, 4)
        assert off(model) < 1
    else:  # made without the model, as far as the copy can know

        def go_on() -> None:
            optimizer.add_param_group({"params": parts(model)[0]})
            steps(problem, model, optimizer, 1)

        with pytest.raises(ValueError, match=r"param_groups: found .* orthonormal columns .* load this one's state_d"):
            go_on()


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_is_gone_leaves_its_parts(kind: str) -> None:
    problem = Problem()
    model = problem.copy()
    early, late = parts(model)
    freeze(early)
    target = nn.ModuleDict({"wrapped": nn.ModuleList([model.first, model.second])})
    optimizer = optimizer_of(kind, early + late, target)
    del target
    gc.collect()
    freeze(early, False)
    steps(problem, model, optimizer, 4)
    assert off(model) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_none", [False, True])
@pytest.mark.parametrize("where", ["model", "first", "first, by another module"])
def test_parameters_that_are_replaced_after_some_steps_are_an_error(kind: str, to_none: bool, where: str) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = optimizer_of(kind, list(model.parameters()), model)
    steps(problem, model, optimizer, 2, to_none)
    if where == "first, by another module":
        model.first = Problem().copy().first  # type: ignore[assignment]
    else:
        part = model if where == "model" else model.first
        part.load_state_dict({k: v.clone() for k, v in part.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"first\.U.* of the model is another parameter now"):
        steps(problem, model, optimizer, 1, to_none)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_layer_put_in_front_takes_the_names_and_nothing_else(kind: str) -> None:
    layers = [StellaLinear(nn.Linear(12, 12), r=3).double() for _ in range(3)]
    trained = nn.Sequential(*layers[:2])
    retract(trained)  # float64 of what was orthonormal in float32
    optimizer = optimizer_of(kind, [p for p in trained.parameters() if p.requires_grad], trained)
    x = torch.randn(8, 12, dtype=torch.float64)
    for step in range(9):
        if step == 3:
            trained.insert(0, layers[2].requires_grad_(False))
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        before = layers[0].U.detach().clone()
        optimizer.step()
        assert not torch.equal(before, layers[0].U)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_were_replaced_and_given_to_the_optimizer_train_on(kind: str) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = optimizer_of(kind, list(model.parameters()), model)
    steps(problem, model, optimizer, 2)
    model.first.load_state_dict({k: v.clone() for k, v in model.first.state_dict().items()}, assign=True)
    optimizer.add_param_group({"params": parts(model)[0]})
    before = model.first.U.detach().clone()
    steps(problem, model, optimizer, 2)
    assert not torch.equal(before, model.first.U)
    assert off(model) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_none", [False, True])
def test_a_layer_that_takes_over_and_is_in_no_optimizer_is_an_error(kind: str, to_none: bool) -> None:
    problem = Problem()
    model = problem.copy()
    freeze(parts(model)[0])
    optimizer = optimizer_of(kind, parts(model)[1], model)
    steps(problem, model, optimizer, 3, to_none)
    freeze(parts(model)[0], False)
    freeze(parts(model)[1])
    with pytest.raises(ValueError, match=r"optimizer: it does not hold first\.U, first\.Vt of the model"):
        steps(problem, model, optimizer, 2, to_none)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_trains_beside_and_is_in_no_optimizer_is_warned_of_once(kind: str) -> None:
    problem = Problem()
    model = problem.copy()
    freeze(parts(model)[0])
    optimizer = optimizer_of(kind, parts(model)[1], model)
    steps(problem, model, optimizer, 3)
    freeze(parts(model)[0], False)
    with pytest.warns(RuntimeWarning, match=r"it does not hold first\.U, first\.Vt of the model") as caught:
        steps(problem, model, optimizer, 20)
    assert len(caught) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_two_optimizers_of_one_model_do_not_ask_for_each_others_factors(kind: str) -> None:
    problem = Problem()
    model = problem.copy()
    early, late = parts(model)
    optimizers = []
    for mine, others in ((early, late), (late, early)):
        freeze(others)
        freeze(mine, False)
        optimizers.append(optimizer_of(kind, mine, model))
    freeze(early, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(10):
            for optimizer in optimizers:
                optimizer.zero_grad()
                problem.loss(model, step).backward()
                optimizer.step()
    assert off(model) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_another_loss_come_first_or_between(kind: str) -> None:
    problem = Problem()
    model = problem.copy()
    head = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = optimizer_of(kind, [*model.parameters(), head], model)

    def of_head(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            head.square().sum().backward()
            optimizer.step()

    of_head(2)
    steps(problem, model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_head(2)
        steps(problem, model, optimizer, 1)
        freeze(list(model.parameters()))
        of_head(10)  # frozen meanwhile, as the message advises
        freeze(list(model.parameters()), False)
    with pytest.warns(RuntimeWarning, match="no gradient was found in any of the 4") as caught:
        of_head(10)
    assert len(caught) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_only_another_loss_is_an_error_after_some_steps(kind: str) -> None:
    model = Problem().copy()
    head = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = optimizer_of(kind, [*model.parameters(), head], model)
    head.square().sum().backward()
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"no gradient was found .* freeze them"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_listed_factor_that_is_replaced_is_warned_of_once(kind: str) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = optimizer_of(kind, list(model.parameters()), stiefel_factors(model))
    model.first.load_state_dict(model.first.state_dict(), assign=True)
    with pytest.warns(RuntimeWarning, match=r"first\.U, first\.Vt had no gradient.*no module has") as caught:
        steps(problem, model, optimizer, 9)
    assert len([w for w in caught if "no module has" in str(w.message)]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_listed_factor_that_rests_in_its_module_is_nobodys_business(kind: str) -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = optimizer_of(kind, list(model.parameters()), stiefel_factors(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(9):
            optimizer.zero_grad()
            problem.loss(model, step).backward()
            model.second.U.grad = None
            optimizer.step()

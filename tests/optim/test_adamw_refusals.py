"""What ``StellaAdamW`` refuses or skips, changing nothing: values that are not finite, arguments, options set later."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from stella_kernels.checks import NonFiniteError
from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW, attach
from tests.optim.stiefel_problem import PLAIN, Model, Problem, fused, identical, same_state, state_of, values
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what is not finite ---


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(mixed: bool, steps: int, value: float) -> None:
    """No parameter, no moment, no step count, also in the first step and where there are two operator calls."""
    problem = Problem()
    model = problem.copy()
    if mixed:
        model.first.float()
    optimizer = StellaAdamW(model, **PLAIN)

    def backward() -> None:
        for p in model.parameters():
            p.grad = torch.randn_like(p)

    for _ in range(steps):
        backward()
        optimizer.step()
    backward()
    assert model.second.Vt.grad is not None
    model.second.Vt.grad[2, 5] = value
    before, state = values(model), state_of(optimizer)
    with pytest.raises(NonFiniteError, match=r"the gradient of second\.Vt holds NaN") as caught:
        optimizer.step()
    assert caught.value.names == ("second.Vt",)
    assert identical(values(model), before)
    assert same_state(state_of(optimizer), state)
    assert len(optimizer.state) == (6 if steps else 0)
    backward()
    optimizer.step()
    assert all(float(s["step"]) == steps + 1 for s in optimizer.state.values())


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(mixed: bool) -> None:
    problem = Problem()
    model = problem.copy()
    if mixed:
        model.first.float()
    optimizer = StellaAdamW(model, skip_nonfinite=True, **PLAIN)
    twin = copy.deepcopy(model)
    sound = StellaAdamW(twin, **PLAIN)
    for index in range(4):
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            if index in (0, 2) and name == "second.Vt":
                p.grad[1, 1] = math.nan
        optimizer.step()
        if index in (1, 3):
            sound.step()
        else:
            assert len(optimizer.state) == (0 if index == 0 else 6)
    assert identical(values(model), values(twin))
    assert optimizer.skipped == {"second.Vt": 2}
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_non_finite_factor_is_named(skip_nonfinite: bool) -> None:
    problem = Problem()
    model, optimizer = fused(problem, 1, skip_nonfinite=skip_nonfinite)
    with torch.no_grad():
        model.first.Vt[0, 0] = math.nan
    before = values(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with pytest.raises(
        NonFiniteError, match=r"the value of first\.Vt holds NaN .*as optimizer\.step\(\) began"
    ) as caught:
        optimizer.step()
    assert caught.value.names == ("first.Vt",)
    assert all(torch.equal(p.detach().nan_to_num(), before[name].nan_to_num()) for name, p in model.named_parameters())
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("where", ["value", "moment"])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_what_no_version_counter_shows_stops_its_factor_alone(where: str, skip_nonfinite: bool) -> None:
    problem = Problem()
    model, optimizer = fused(problem, 1, skip_nonfinite=skip_nonfinite)
    with torch.no_grad():
        (model.first.Vt.data if where == "value" else optimizer.state[model.first.Vt]["exp_avg"])[0, 0] = math.nan
    before = model.first.Vt.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    value = r"the value of first\.Vt holds NaN .* was not taken for first\.Vt"
    message = value if where == "value" else r"a moment of first\.Vt holds NaN .* not taken for first\.Vt"
    with pytest.raises(NonFiniteError, match=message) as caught:
        optimizer.step()
    assert caught.value.names == ("first.Vt",)
    assert torch.equal(model.first.Vt.nan_to_num(), before.nan_to_num())
    assert not optimizer.skipped
    assert float(optimizer.state[model.first.Vt]["step"]) == 1
    assert float(optimizer.state[model.second.Vt]["step"]) == 2


# --- refused ---


def spoiled(model: Model) -> Model:
    with torch.no_grad():
        model.first.U.mul_(1.5)
    return model


REFUSED: dict[str, tuple[Callable[[Model], Any], type[Exception], str]] = {
    "amsgrad": (lambda m: StellaAdamW(m, amsgrad=True), ValueError, r"amsgrad: found True.*attach"),
    "amsgrad by group": (
        lambda m: StellaAdamW([{"params": m.parameters(), "amsgrad": True}], factors=m, weight_decay=0.0).step(),
        ValueError,
        "amsgrad: found True",
    ),
    "retraction": (lambda m: StellaAdamW(m, retraction="qr"), ValueError, r"retraction: found 'qr'.*attach"),
    "unknown retraction": (lambda m: StellaAdamW(m, retraction="x"), ValueError, "retraction: found 'x', wanted one"),
    "no factors named": (lambda m: StellaAdamW(m.parameters()), ValueError, "factors: found None"),
    "weight decay": (
        lambda m: StellaAdamW(m.parameters(), factors=m),
        ValueError,
        r"group 0 has weight_decay=0\.01 and holds the constrained first\.U",
    ),
    "not held": (
        lambda m: StellaAdamW([m.first.U, m.first.S], weight_decay=0.0, factors=m),
        ValueError,
        r"optimizer: it does not hold first\.Vt, second\.U, second\.Vt",
    ),
    "no adapters": (lambda m: StellaAdamW(nn.Linear(3, 3)), ValueError, "no trainable Stiefel factors"),
    "hidden size": (lambda m: StellaAdamW(m.first), ValueError, "grad_scaling: True takes the model's hidden size"),
    "not orthonormal": (lambda m: StellaAdamW(spoiled(m)), ValueError, r"first\.U: found columns with ‖QᵀQ − I‖"),
    "negative rate": (lambda m: StellaAdamW(m, lr=-1.0), ValueError, "Invalid learning rate"),
    "attach": (
        lambda m: attach(StellaAdamW(m), m),
        ValueError,
        r"target: first\.U, first\.Vt, second\.U, second\.Vt already constrained by this StellaAdamW",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_bad_arguments_are_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(Model())


def test_options_set_later_are_refused_with_nothing_changed() -> None:
    problem = Problem()
    model, optimizer = fused(problem, 1)
    problem.loss(model, 1).backward()
    before, state = values(model), state_of(optimizer)
    for key, value, message in [
        ("weight_decay", 0.1, r"weight_decay=0\.1 and holds the constrained first\.U"),
        ("amsgrad", True, "amsgrad: found True"),
        ("capturable", True, "capturable: found True"),
    ]:
        kept = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer.param_groups[0][key] = kept
    optimizer.param_groups[1]["foreach"], optimizer.param_groups[1]["lr"] = True, torch.tensor(0.1)
    with pytest.raises(ValueError, match="foreach=True and lr as a tensor"):
        optimizer.step()
    assert identical(values(model), before)
    assert same_state(state_of(optimizer), state)


def test_a_state_with_amsgrad_is_refused() -> None:
    problem = Problem()
    model, optimizer = fused(problem, 1)
    state = state_of(optimizer)
    constrained = [f.parameter for f in stiefel_factors(model)]
    other = AdamW([{"params": constrained}, {"params": [model.first.S, model.second.S]}], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad: found True"):
        optimizer.load_state_dict(other.state_dict())
    assert same_state(state_of(optimizer), state)
    assert not optimizer.param_groups[0]["amsgrad"]


def test_sparse_gradients_are_refused() -> None:
    table = nn.Parameter(orthonormal(8, 3))
    optimizer = StellaAdamW([table], factors=[table], grad_scaling=False, **PLAIN)
    nn.functional.embedding(torch.tensor([1, 2]), table, sparse=True).sum().backward()
    with pytest.raises(RuntimeError, match=r"target\[0\]: found a gradient of layout torch\.sparse_coo"):
        optimizer.step()
    assert not optimizer.state


def test_a_factor_twice_or_replaced_in_the_groups_is_refused() -> None:
    problem = Problem()
    model, optimizer = fused(problem, 1)
    problem.loss(model, 1).backward()
    constrained = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [*constrained, constrained[0]]
    with pytest.raises(ValueError, match="found 5 places that hold the 4 constrained factors"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = constrained[1:]
    with pytest.raises(ValueError, match=r"does not hold first\.U"):
        optimizer.step()

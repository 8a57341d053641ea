"""The state of ``StellaAdamW`` and of an attached optimizer: saved, loaded, copied and exchanged between the two."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from stella_kernels.nn import StiefelFactor, stiefel_factors
from stella_kernels.optim import StellaAdamW, attach
from tests.optim.stiefel_problem import (
    F64,
    HIDDEN,
    OPTIMIZERS,
    PLAIN,
    Model,
    Problem,
    distance,
    fused,
    identical,
    published,
    torch_adamw,
    values,
)
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")

# --- StellaAdamW ---


def with_attach(model: Model, fused_others: bool = False) -> AdamW:
    constrained = [f.parameter for f in stiefel_factors(model)]
    groups = [{"params": constrained}, {"params": [model.first.S, model.second.S]}]
    optimizer = AdamW(groups, fused=fused_others or None, **PLAIN)
    attach(optimizer, model)
    return optimizer


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("fused_others", [False, True])
def test_state_is_interchangeable_with_attach(back: bool, fused_others: bool) -> None:
    """5 steps with one, then 7 with the other: where one alone ends, to 1e5 roundings as above."""
    problem = Problem()
    exact = published(problem, torch_adamw(), 12, F64, hidden_size=HIDDEN)
    model = problem.copy()

    def build(stella: bool, m: Model) -> AdamW:
        return StellaAdamW(m, fused=fused_others or None, **PLAIN) if stella else with_attach(m, fused_others)

    optimizer = build(back, model)
    problem.train(model, optimizer, optimizer.step, 0, 5)
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    again = Model()
    other = build(not back, again)
    weights, state = pickle.loads(saved)
    assert state["param_groups"] == other.state_dict()["param_groups"]
    again.load_state_dict(weights)
    other.load_state_dict(state)
    problem.train(again, other, other.step, 5, 12)
    assert distance(values(again), values(exact)) < 1e-10
    assert {k: sorted(s) for k, s in state["state"].items()} == {i: ["exp_avg", "exp_avg_sq", "step"] for i in range(6)}
    assert all(float(s["step"]) == 12 for s in other.state_dict()["state"].values())


@pytest.mark.parametrize("how", ["new tensor", "data", "in place"])
def test_a_counter_that_was_set_is_heeded(how: str) -> None:
    """Counters lie in one memory from the first step on; whoever sets one sets that factor's alone."""
    problem = Problem()
    models = []
    for steps in (3, 9):
        model, optimizer = fused(problem, 3)
        models.append(model)
        for i, factor in enumerate(stiefel_factors(model)):
            state = optimizer.state[factor.parameter]
            wanted = torch.tensor(float(steps) if i == 0 else 3.0)
            if how == "new tensor":
                state["step"] = wanted
            elif how == "data":
                state["step"].data = wanted
            else:
                state["step"].copy_(wanted)
        problem.train(model, optimizer, optimizer.step, 3, 4)
        found = [float(optimizer.state[f.parameter]["step"]) for f in stiefel_factors(model)]
        assert found == [steps + 1.0, 4.0, 4.0, 4.0]
    factors = [[f.parameter for f in stiefel_factors(m)] for m in models]
    same = [torch.equal(a, b) for a, b in zip(*factors, strict=True)]
    assert same == [False, True, True, True]  # the bias correction of step 10 is another than that of step 4


def test_counters_that_differ_beside_several_dtypes() -> None:
    """A call for each dtype, of places that alternate: each factor takes the step that it takes alone."""
    torch.manual_seed(5)
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float64]
    factors = [nn.Parameter(orthonormal(20, 3, dtype=dtype)) for dtype in dtypes]
    alone = [nn.Parameter(p.detach().clone()) for p in factors]

    def built(parameters: list[nn.Parameter]) -> StellaAdamW:
        named = [StiefelFactor(p, False, f"factor {i}") for i, p in enumerate(parameters)]
        return StellaAdamW(parameters, factors=named, grad_scaling=False, weight_decay=0.0, lr=0.1)

    together, single = built(factors), [built([p]) for p in alone]
    for step in range(2):
        for i, (p, own) in enumerate(zip(factors, alone, strict=True)):
            own.grad = torch.randn_like(own)
            p.grad = own.grad.clone()
            if step == 1:
                for state in (together.state[p], single[i].state[own]):
                    state["step"].fill_(2.0 + 3.0 * i)
        for optimizer in (together, *single):
            optimizer.step()
    assert [float(together.state[p]["step"]) for p in factors] == [3.0, 6.0, 9.0, 12.0]
    assert all(torch.equal(p, own) for p, own in zip(factors, alone, strict=True))


@pytest.mark.parametrize("attached", [False, True])
def test_loading_in_place_goes_on_bitwise(attached: bool) -> None:
    problem = Problem()
    if attached:
        model = problem.copy()
        optimizer = with_attach(model)
        problem.train(model, optimizer, optimizer.step, 0, 3)
    else:
        model, optimizer = fused(problem, 3)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    problem.train(model, optimizer, optimizer.step, 3, 6)
    expected = values(model)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    problem.train(model, optimizer, optimizer.step, 3, 6)
    assert identical(values(model), expected)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copies_go_on_alike(how: str) -> None:
    problem = Problem()
    model, optimizer = fused(problem, 3, skip_nonfinite=True)
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "copied" else pickle.loads(pickle.dumps(pair))
    problem.train(model, optimizer, optimizer.step, 3, 6)
    problem.train(twin, other, other.step, 3, 6)
    assert identical(values(twin), values(model))
    assert {id(f.parameter) for f in other.factors} == {id(f.parameter) for f in stiefel_factors(twin)}
    assert other.skip_nonfinite


def test_a_factor_added_later_is_constrained() -> None:
    problem = Problem()
    model = problem.copy()
    model.second.requires_grad_(False)
    optimizer = StellaAdamW(model, **PLAIN)
    model.second.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 and holds the constrained second\.U"):
        optimizer.add_param_group({"params": [model.second.U], "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": list(model.second.parameters())})
    assert [f.name for f in optimizer.factors] == ["first.U", "first.Vt", "second.U", "second.Vt"]
    problem.train(model, optimizer, optimizer.step, 0, 5)
    exact = published(problem, torch_adamw(), 5, F64, hidden_size=HIDDEN)
    assert distance(values(model), values(exact)) < 1e-10


# --- attach ---


def test_state_dict_round_trip() -> None:
    """Saved after 5 steps and rebuilt, training goes on as if nothing had happened, and hooks leave no trace in it."""
    problem, build = Problem(), OPTIMIZERS["adamw"]
    model = problem.copy()
    optimizer = build(model.parameters())
    attach(optimizer, model)
    problem.train(model, optimizer, optimizer.step, 0, 5)
    bare = build(problem.copy().parameters())
    assert optimizer.state_dict()["param_groups"] == bare.state_dict()["param_groups"]
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    problem.train(model, optimizer, optimizer.step, 5, 12)

    again = Model()
    optimizer = build(again.parameters())
    weights, state = pickle.loads(saved)
    again.load_state_dict(weights)
    optimizer.load_state_dict(state)
    attach(optimizer, again)
    problem.train(again, optimizer, optimizer.step, 5, 12)
    assert identical(values(again), values(model))

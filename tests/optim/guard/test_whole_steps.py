"""A step is taken whole or not at all, by all groups and attachments; copies of optimizers; drift that is bounded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stella_kernels import StellaLinear
from stella_kernels.checks import NonFiniteError
from stella_kernels.nn import StiefelFactor, orthonormality_tolerance
from stella_kernels.optim import StellaAdamW, attach, retract
from tests.optim.guard.test_memory import KINDS, backward, layer_and_optimizer, trained
from tests.optim.stiefel_problem import identical, values
from tests.optim.test_foreign_moves import GROUPS, Averaging, off
from tests.random_matrices import orthonormal


def huge(p: nn.Parameter) -> None:
    p.grad = torch.full_like(p, 3e38)


def not_finite(p: nn.Parameter) -> None:
    p.grad = torch.full_like(p, torch.nan)


def expanded(p: nn.Parameter) -> None:
    p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)


def sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def moved(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    with torch.no_grad():
        p.add_(0.1)


FAULTS: dict[str, tuple[Callable[[nn.Parameter], None], str]] = {
    "overflow": (huge, "so large that the Riemannian gradient overflows; nothing was changed"),
    "NaN": (not_finite, "holds NaN or an infinity"),
    "expanded": (expanded, "elements share memory"),
    "sparse": (sparse, "found a gradient of layout torch.sparse"),
    "moved": (
        moved,
        "this optimizer's step moved it|where a constrained factor had moved already",
    ),
    "weight decay": (lambda p: None, "weight_decay"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("how", ["two groups", "two attachments"])
@pytest.mark.parametrize("closure", [False, True])
def test_no_gradient_is_rewritten_where_another_is_refused(fault: str, how: str, closure: bool) -> None:
    dtype = torch.float64 if how == "two groups" else torch.float32
    a, b = nn.Parameter(orthonormal(24, 4, dtype=dtype)), nn.Parameter(orthonormal(24, 4, dtype=torch.float32))
    optimizer = SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    for target in [[a, b]] if how == "two groups" else [[a], [b]]:
        attach(optimizer, target, grad_scaling=False)
    a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    optimizer.step()
    spoil, message = FAULTS[fault]
    if fault == "weight decay":
        optimizer.param_groups[1]["weight_decay"] = 0.1
    gradient = torch.randn_like(a)

    def evaluate() -> float:
        a.grad, b.grad = gradient.clone(), torch.randn_like(b)
        spoil(b)
        return 0.0

    if not closure:
        evaluate()
    before = a.detach().clone()
    with pytest.raises((NonFiniteError, RuntimeError, ValueError), match=message):
        optimizer.step(evaluate if closure else None)  # type: ignore[arg-type]
    if fault != "weight decay" or not closure:  # which is known before there are gradients
        assert torch.equal(a.grad, gradient)
    assert torch.equal(a, before)


def test_a_large_gradient_that_does_not_overflow_is_taken() -> None:
    a, b = (nn.Parameter(orthonormal(24, 4, dtype=d)) for d in (torch.float64, torch.float32))
    optimizer = SGD([a, b], lr=1e-38)
    attach(optimizer, [a, b], grad_scaling=False)
    a.grad, b.grad = torch.randn_like(a), torch.zeros_like(b)
    b.grad[0, 0] = 1e38
    optimizer.step()
    assert bool(b.isfinite().all())


def test_a_quotient_gradient_that_overflows_is_refused_before_anything_moves() -> None:
    model = StellaLinear(nn.Linear(24, 24), r=4)
    optimizer = SGD([model.U, model.S, model.Vt], lr=0.1)
    attach(optimizer, model, grad_scaling=False, geometry="quotient")
    backward(model, optimizer)
    model.U.grad.fill_(3e38)
    before, gradient = values(model), model.Vt.grad.clone()
    with pytest.raises(NonFiniteError, match=r"overflows, .* nothing was changed"):
        optimizer.step()
    assert identical(values(model), before)
    assert torch.equal(model.Vt.grad, gradient)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_step_that_fails_in_one_attachment_is_taken_back_in_all(bad: int) -> None:
    class Spoiling(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            parameters[bad].data[0, 0] = torch.nan

    parameters = [nn.Parameter(orthonormal(24, 4, dtype=torch.float32)) for _ in range(2)]
    optimizer = Spoiling(parameters, lr=0.1)
    for p in parameters:
        attach(optimizer, [p], grad_scaling=False)
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(NonFiniteError, match="All factors were put back"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_the_quotient_follows_a_step_that_changes_the_dtype() -> None:
    class Widening(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                gradient, p.grad = p.grad, None
                p.data = p.double() - 0.01 * gradient

    model = StellaLinear(nn.Linear(24, 24), r=4)
    optimizer = Widening([model.U, model.S, model.Vt], lr=0.1)
    attach(optimizer, model, grad_scaling=False, geometry="quotient")
    backward(model, optimizer)
    optimizer.step()
    assert model.U.dtype == torch.float64
    assert off(model) < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("retraction", ["cayley", "exp_map"])
def test_drift_is_bounded(dtype: torch.dtype, retraction: str) -> None:
    p = nn.Parameter(orthonormal(24, 4, dtype=torch.float32).to(dtype))
    target = orthonormal(24, 4, dtype=torch.float32)
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    attach(optimizer, [p], grad_scaling=False, retraction=retraction)
    factor = StiefelFactor(p, False, "p")
    for _ in range(400):
        p.grad = (p.detach().float() - target + 0.3 * torch.randn(24, 4)).to(dtype)
        optimizer.step()
        Q = p.detach().double()
        assert float((Q.mT @ Q - torch.eye(4)).norm()) <= orthonormality_tolerance(factor)


class OwnState(SGD):
    """As many wrappers have it."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


class AveragingWithState(Averaging):
    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_class_that_copies_its_whole_dictionary_keeps_its_geometry(copied: Any, wrapped: bool) -> None:
    model = StellaLinear(nn.Linear(24, 24), r=4)
    optimizer: Optimizer = OwnState(trained(model), lr=0.1)
    if wrapped:
        optimizer = AveragingWithState(optimizer)
    attach(optimizer, model, grad_scaling=False)
    backward(model, optimizer)
    optimizer.step()
    other, its = copied((model, optimizer))
    for m, o in ((model, optimizer), (other, its)):
        for _ in range(3):
            backward(m, o)
            o.step()
            assert off(m) < 1
    if not wrapped:  # its own dictionary of slow weights is by tensor, and lost its order of ids
        assert identical(values(model), values(other))


def test_the_state_of_another_optimizer_is_refused_whole() -> None:
    model, optimizer = layer_and_optimizer("fused")
    backward(model, optimizer)
    optimizer.step()
    other = SGD(trained(model), lr=0.3, momentum=0.9)
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state_dict: found param_groups\[0\] without betas, eps, so it is of an"):
        optimizer.load_state_dict(other.state_dict())
    mixed = {"param_groups": before["param_groups"], "state": other.state_dict()["state"]}
    with pytest.raises(ValueError, match=r"state_dict: found state\[0\] without step, exp_avg, exp_avg_sq"):
        optimizer.load_state_dict(mixed)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][k], before["state"][0][k]) for k in before["state"][0])


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("dtypes", ["float32", "float16", "mixed"])
def test_a_step_that_would_overflow_changes_nothing(dtypes: str, skips: bool) -> None:
    """Neither that factor nor any other, nor a moment or a step count, in one operator call or several."""
    torch.manual_seed(5)
    model = nn.Sequential(*(StellaLinear(nn.Linear(24, 24), r=4) for _ in range(3)))
    if dtypes == "float16":
        model.half()
    elif dtypes == "mixed":
        model[2].double()
        retract(model)
    optimizer = StellaAdamW(model, grad_scaling=False, skip_nonfinite=skips)

    def fill() -> None:
        for p in model.parameters():
            p.grad = 1e-2 * torch.randn_like(p) if p.requires_grad else None

    fill()
    optimizer.step()
    fill()
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    model[1].U.grad[0, 0] = 2e4 if dtypes == "float16" else 1e30
    if skips:
        optimizer.step()
        assert optimizer.skipped == {"1.U": 1}
    else:
        with pytest.raises(NonFiniteError, match=r"gradient of 1\.U is finite .* no parameter and no moment") as caught:
            optimizer.step()
        assert caught.value.names == ("1.U",)
    assert identical(values(model), before)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])
    fill()
    optimizer.step()
    assert not identical(values(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_on_a_frozen_factor_that_moves_is_an_error(kind: str) -> None:
    first, second = (StellaLinear(nn.Linear(24, 24), r=4) for _ in range(2))
    model = nn.Sequential(first, second)
    backward(model, SGD(trained(model), lr=0.1))
    for p in (first.U, first.S, first.Vt):
        p.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": [second.U, second.Vt], "weight_decay": 0.0},
        {"params": [first.U, first.Vt], "weight_decay": 0.1},
    ]
    if kind == "fused":
        optimizer: Optimizer = StellaAdamW(groups, factors=model, grad_scaling=False)
    else:
        optimizer = AdamW(groups)
        attach(optimizer, model, grad_scaling=False)
    with pytest.raises(ValueError, match=r"group 1 has weight_decay=0\.1 and holds the constrained 0\.U, 0\.Vt"):
        optimizer.step()
    assert GROUPS["weight_decay"] == 0.0
    assert isinstance(first.U, Tensor)


@pytest.mark.parametrize("none_first", [False, True])
def test_gradients_that_a_hook_exchanges_between_two_attachments_are_made_riemannian(none_first: bool) -> None:
    model, optimizer = layer_and_optimizer("attach")
    second = nn.Sequential(StellaLinear(nn.Linear(24, 24), r=4))
    optimizer.add_param_group({"params": trained(second), **GROUPS})
    U = second[0].U

    def exchange(optimizer: Optimizer, args: object, kwargs: object) -> None:
        U.grad = torch.ones_like(U)

    optimizer.register_step_pre_hook(exchange)
    attach(optimizer, second, grad_scaling=False)
    backward(nn.Sequential(model[0], second[0]), optimizer)
    if none_first:
        U.grad = None
    before = U.detach().clone()
    optimizer.step()
    skew = before.mT @ U.grad
    # products of sums over 24 elements of size at most 5
    assert float((skew + skew.mT).norm()) <= 64 * torch.finfo(U.dtype).eps * float(before.norm() * U.grad.norm())
    assert off(second) < 1


def test_a_moment_that_torch_would_refuse_is_refused_before_a_factor_moves() -> None:
    model, optimizer = layer_and_optimizer("fused")
    backward(model, optimizer)
    optimizer.step()
    optimizer.state[model[0].S]["exp_avg"] = optimizer.state[model[0].S]["exp_avg"].double()
    before = values(model)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: found a moment .*torch\.float64"):
        optimizer.step()
    assert identical(values(model), before)


def test_a_moment_of_float16_near_its_limit_is_foreseen_among_other_dtypes() -> None:
    narrow = nn.Parameter(orthonormal(24, 4, dtype=torch.float32).half())
    wide = nn.Parameter(orthonormal(24, 4, dtype=torch.float32))
    optimizer = StellaAdamW([wide, narrow], factors=[wide, narrow], grad_scaling=False, **GROUPS)
    for p in (wide, narrow):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[narrow]["exp_avg_sq"].fill_(65504.0)
    narrow.grad = torch.full_like(narrow, 0.0)
    narrow.grad[0, 0] = 8000.0  # its square, by 1 - beta2, is more than what decays
    before = [p.detach().clone() for p in (wide, narrow)]
    with pytest.raises(NonFiniteError, match="overflows"):
        optimizer.step()
    assert all(map(torch.equal, (wide.detach(), narrow.detach()), before))

"""``StellaAdamW`` against the published step around torch's AdamW, option by option, and its state."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from stella_kernels.nn import StiefelFactor, stiefel_factors
from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.reference import stiefel
from stella_kernels.reference.step import PublishedStep
from tests.optim.stiefel_problem import (
    F64,
    HIDDEN,
    PLAIN,
    Adapter,
    Model,
    Problem,
    distance,
    fused,
    identical,
    published,
    same_state,
    state_of,
    torch_adamw,
    values,
    worst_error,
)
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the same trajectory as published ---

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "betas": {"betas": (0.7, 0.95)},
    "large eps": {"eps": 1e-3},
    "maximize": {"maximize": True, "lr": 1e-3},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused others": {"fused": True},
    "tensor lr": {"lr": torch.tensor(2e-2, dtype=F64)},
}


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_float64_equals_the_published_step_and_attach(option: str) -> None:
    """20 steps: 1e-10 is 1e5 roundings, room for the amplification by the problem, and no more."""
    problem, kwargs = Problem(), OPTIONS[option]
    exact = published(problem, torch_adamw(**kwargs), 20, F64, hidden_size=HIDDEN)
    model, optimizer = fused(problem, 20, **kwargs)
    assert distance(values(model), values(problem.model)) > 1e-2  # it did move
    assert distance(values(model), values(exact)) < 1e-10
    assert worst_error(model) < 1e-14
    attached = problem.copy()
    other = torch_adamw(**kwargs)(attached.parameters())
    attach(other, attached)
    problem.train(attached, other, other.step, 0, 20)
    assert distance(values(model), values(attached)) < 1e-10
    assert optimizer.last_info is not None
    assert bool((optimizer.last_info[:, 0] == 0).all())


@pytest.mark.parametrize(("grad_scaling", "hidden_size"), [(False, None), (40, 40.0), (True, HIDDEN)])
def test_gradient_scaling(grad_scaling: bool | float, hidden_size: float | None) -> None:
    problem = Problem()
    exact = published(problem, torch_adamw(), 10, F64, hidden_size=hidden_size)
    assert distance(values(fused(problem, 10, grad_scaling=grad_scaling)[0]), values(exact)) < 1e-10
    other = published(problem, torch_adamw(), 10, F64, hidden_size=17.0)
    assert distance(values(other), values(exact)) > 1e-4  # else this could not fail


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "r"), [(64, 4), (300, 16), (40, 40)])
def test_float32_stays_with_float64_over_50_steps(n: int, r: int, transposed: bool) -> None:
    """The same 50 gradients in both: 1e-5 relative is 50 steps of 1.7 eps each, if no two errors cancel.

    Gradients that do not depend on the factor let nothing amplify what a step adds: the rounding of Y, eps/2 a
    number, and its retraction's.
    """
    start, gradients = orthonormal(n, r), torch.randn(50, n, r, dtype=F64)
    results = []
    for dtype in (F64, torch.float32):
        value = start.to(dtype, copy=True)
        parameter = nn.Parameter(value.mT.contiguous() if transposed else value)
        factor = StiefelFactor(parameter, transposed, "Y")
        if dtype == F64:
            inner = AdamW([parameter], lr=5e-3, weight_decay=0.0)
            step: Callable[[], Any] = PublishedStep(inner, [factor]).step
        else:
            step = StellaAdamW([parameter], lr=5e-3, weight_decay=0.0, factors=[factor], grad_scaling=False).step
        for gradient in gradients:
            parameter.grad = (gradient.mT if transposed else gradient).to(dtype, copy=True).contiguous()
            step()
        results.append(factor.view.double())
    exact, got = results
    assert float(torch.linalg.norm(exact - start)) > 0.1 * math.sqrt(r)  # it went somewhere
    assert float(torch.linalg.norm(got - exact)) < 1e-5 * math.sqrt(r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_stay_as_orthonormal_as_their_dtype_allows(dtype: torch.dtype) -> None:
    """Rounding Q to the dtype, relative error at most eps/2, moves QᵀQ by at most eps sqrt(r) and a little; r ≤ 4."""
    problem = Problem()
    model, _ = fused(problem, 10, dtype, eps=1e-4)
    assert distance(values(model), values(problem.model)) > 1e-2
    assert worst_error(model) < 1.1 * torch.finfo(dtype).eps * 2


@pytest.mark.parametrize(("n", "r"), [(96, 8), (48, 48)])
def test_a_thousand_random_steps_do_not_drift(n: int, r: int) -> None:
    """The residual is that of the last retraction, not of a thousand: 5e-7 sqrt(r), or what a float32 SVD leaves."""
    native = torch._C._dispatch_has_kernel_for_dispatch_key("stella_kernels::stella_adamw_", "CPU")
    limit = 5e-7 if native else 4 * torch.finfo(torch.float32).eps * math.sqrt(n)
    U, Vt = (
        nn.Parameter(orthonormal(n, r, dtype=torch.float32)),
        nn.Parameter(orthonormal(n, r, dtype=torch.float32).mT.clone()),
    )
    factors = [StiefelFactor(U, False, "U"), StiefelFactor(Vt, True, "Vt")]
    optimizer = StellaAdamW([U, Vt], lr=1e-2, weight_decay=0.0, factors=factors, grad_scaling=False)
    start = U.detach().clone()
    for _ in range(1000):
        for p in (U, Vt):
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert float(torch.linalg.norm(U.detach() - start)) > 0.5
    for factor in factors:
        assert float(stiefel.orthonormality_error(factor.view.double())) < limit * math.sqrt(r)


# --- groups, options, and what is around a step ---


def grouped(model: Model) -> list[dict[str, Any]]:
    constrained = [f.parameter for f in stiefel_factors(model)]
    return [
        {"params": [model.first.S, model.second.S], "weight_decay": 0.1, "maximize": False},
        {"params": constrained[:1], "lr": 5e-3, "weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-5},
        {"params": constrained[1:3], "weight_decay": torch.tensor(0.0), "maximize": True, "lr": 1e-3},
        {"params": constrained[3:], "weight_decay": 0.0},
    ]


def test_groups_and_scheduler() -> None:
    """Groups with their own lr, betas, eps and sign; the rates change at each step, betas and eps once."""
    problem = Problem()
    models = problem.copy(), problem.copy()
    mine = StellaAdamW(grouped(models[0]), lr=1e-2, factors=models[0])
    plain = AdamW(grouped(models[1]), lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 2e-2, total_steps=12) for o in (mine, plain)]
    stepper = PublishedStep(plain, stiefel_factors(models[1]), hidden_size=HIDDEN)
    for index in range(10):
        for model, optimizer, step in zip(models, (mine, plain), (mine.step, stepper.step), strict=True):
            if index == 5:
                optimizer.param_groups[3]["eps"] = 1e-2
            problem.train(model, optimizer, step, index, index + 1)
        for scheduler in schedulers:
            scheduler.step()
    assert distance(values(models[0]), values(models[1])) < 1e-10


@pytest.mark.parametrize("foreach", [None, False, True])
def test_other_parameters_take_torch_adamw(foreach: bool | None) -> None:
    """Bit for bit, with weight decay, where the gradients are the same."""
    problem = Problem()
    model, twin = problem.copy(), problem.copy()
    optimizer = StellaAdamW(model, lr=1e-2, weight_decay=0.1, foreach=foreach)
    other = AdamW([twin.first.S, twin.second.S], lr=1e-2, weight_decay=0.1, foreach=foreach)
    for _ in range(4):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(model.first.S, twin.first.S)
    assert torch.equal(model.second.S, twin.second.S)
    assert not torch.equal(model.first.S, problem.model.first.S)


def test_a_model_makes_two_groups() -> None:
    model = Model()
    model.second.U.requires_grad_(False)
    optimizer = StellaAdamW(model, lr=1e-3, weight_decay=0.05)
    first, second = optimizer.param_groups
    assert first["weight_decay"] == 0.0
    assert second["weight_decay"] == 0.05
    assert [id(p) for p in first["params"]] == [id(p) for p in (model.first.U, model.first.Vt, model.second.Vt)]
    assert [id(p) for p in second["params"]] == [id(p) for p in (model.first.S, model.second.S)]
    assert [f.name for f in optimizer.factors] == ["first.U", "first.Vt", "second.Vt"]
    assert optimizer.param_groups[0].keys() == AdamW(model.parameters()).param_groups[0].keys()


def test_parameters_without_gradient_are_left_alone_and_steps_counted_as_in_torch() -> None:
    problem = Problem()
    model, optimizer = fused(problem, 2)
    before = values(model)
    optimizer.zero_grad()
    x, _ = problem.batches[0]
    model.first(x).square().sum().backward()
    optimizer.step()
    after = values(model)
    assert all(torch.equal(after[f"second.{name}"], before[f"second.{name}"]) for name in ("U", "S", "Vt"))
    assert not torch.equal(after["first.U"], before["first.U"])
    assert optimizer.last_info is not None
    assert optimizer.last_info.shape == (2, 5)
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [3, 3, 3, 2, 2, 2]
    optimizer.zero_grad()
    optimizer.step()
    assert identical(values(model), after)


def test_gradients_are_left_as_they_are() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = StellaAdamW(model, **PLAIN)
    problem.loss(model, 0).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert len(before) == 6


def test_clipped_gradients() -> None:
    problem = Problem()
    models = problem.copy(), problem.copy()
    mine, plain = StellaAdamW(models[0], **PLAIN), AdamW(models[1].parameters(), **PLAIN)
    stepper = PublishedStep(plain, stiefel_factors(models[1]), hidden_size=HIDDEN)
    for index in range(6):
        for model, optimizer, step in zip(models, (mine, plain), (mine.step, stepper.step), strict=True):
            optimizer.zero_grad()
            problem.loss(model, index).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01 * (1 + index))
            step()
    assert distance(values(models[0]), values(models[1])) < 1e-10


def test_closures() -> None:
    problem = Problem()
    expected, _ = fused(problem, 3)
    model = problem.copy()
    optimizer = StellaAdamW(model, **PLAIN)
    for index in range(3):

        def closure(index: int = index) -> Tensor:
            optimizer.zero_grad()
            loss = problem.loss(model, index)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert isinstance(loss, Tensor)
    assert identical(values(model), values(expected))


@pytest.mark.parametrize("others_fused", [None, True])
def test_grad_scaler(others_fused: bool | None) -> None:
    """Scaled by a power of two and unscaled by the scaler, then a batch that overflows, which it skips."""
    problem = Problem()
    expected, _ = fused(problem, 4, torch.float32, fused=others_fused)
    model = problem.copy(torch.float32)
    optimizer = StellaAdamW(model, fused=others_fused, **PLAIN)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(index: int, spoil: bool = False) -> None:
        optimizer.zero_grad()
        scaler.scale(problem.loss(model, index)).backward()
        if spoil:
            assert model.first.U.grad is not None
            model.first.U.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    for index in range(4):
        step(index)
    assert distance(values(model), values(expected)) < 1e-4  # float32, four steps
    before, state = values(model), state_of(optimizer)
    step(4, spoil=True)
    assert identical(values(model), before)
    assert same_state(state_of(optimizer), state)
    assert scaler.get_scale() == 512.0
    step(5)
    assert not identical(values(model), before)
    assert worst_error(model) < 1e-5


def test_step_hooks_fire_once() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = StellaAdamW(model, **PLAIN)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    problem.train(model, optimizer, optimizer.step, 0, 1)
    assert fired == ["pre", "post"]


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    operator = torch.ops.stella_kernels.stella_adamw_

    def counted(factors: list[Tensor], *args: Any) -> Tensor:
        calls.append(len(factors))
        return operator(factors, *args)

    monkeypatch.setattr(torch.ops.stella_kernels, "stella_adamw_", counted)
    return calls


def test_one_operator_call_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_calls(monkeypatch)
    problem = Problem()
    fused(problem, 2)
    assert calls == [4, 4]
    calls.clear()
    mixed = problem.copy()
    mixed.first.float()
    optimizer = StellaAdamW(mixed, **PLAIN)
    alone = problem.copy()
    apart = [
        StellaAdamW(adapter, grad_scaling=HIDDEN, factors=adapter, **PLAIN)
        for adapter in (alone.first.float(), alone.second)
    ]
    for _ in range(3):
        for p, q in zip(mixed.parameters(), alone.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        assert calls[-2:] == [2, 2]
        assert optimizer.last_info is not None
        both = optimizer.last_info.clone()
        for other in apart:
            other.step()
        assert torch.equal(both, torch.cat([o.last_info for o in apart if o.last_info is not None]))
    assert identical(values(mixed), values(alone))


def test_memory_that_moves_is_followed() -> None:
    problem = Problem()
    model, optimizer = fused(problem, 2, torch.float32)
    model.to(F64)
    optimizer.zero_grad()
    problem.loss(model, 2).backward()
    before = values(model)
    with pytest.raises(ValueError, match=r"first\.U: found a moment exp_avg of .*float32.*float64"):
        optimizer.step()
    assert identical(values(model), before)
    for state in optimizer.state.values():  # a recipe in wide use
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].data = state[key].data.double()
    problem.train(model, optimizer, optimizer.step, 2, 4)
    assert worst_error(model) < 1e-14
    assert not torch.equal(model.first.U, before["first.U"])


def test_strided_parameters_and_gradients() -> None:
    """A factor that is a column slice of a larger array, with a gradient stored the other way round."""
    wide = torch.zeros(11, 6, dtype=F64)
    wide[:, 1:4] = orthonormal(11, 3)
    sliced = nn.Parameter(wide[:, 1:4])
    dense = nn.Parameter(sliced.detach().clone())
    gradient = torch.randn(3, 11, dtype=F64).mT
    for p in (sliced, dense):
        optimizer = StellaAdamW([p], factors=[p], grad_scaling=False, **PLAIN)
        for _ in range(2):
            p.grad = gradient.clone() if p is sliced else gradient.contiguous()
            optimizer.step()
    assert torch.linalg.norm(sliced.detach() - dense.detach()) < 1e-14
    assert bool((wide[:, [0, 4, 5]] == 0).all())


def test_other_factors_can_be_attached() -> None:
    """A model's second adapter by attach, its first by the optimizer itself: the same as both at once."""
    problem = Problem()
    model = problem.copy()
    optimizer = StellaAdamW(model.parameters(), factors=stiefel_factors(model.first), grad_scaling=HIDDEN, **PLAIN)
    attach(optimizer, model.second, grad_scaling=HIDDEN)
    problem.train(model, optimizer, optimizer.step, 0, 5)
    exact = published(problem, torch_adamw(), 5, F64, hidden_size=HIDDEN)
    assert distance(values(model), values(exact)) < 1e-10


def test_configuration_of_a_wrapped_model() -> None:
    """The hidden size is read from params where factors are listed."""
    model = Model()
    model.config = SimpleNamespace(hidden_size=40)
    problem = Problem()
    problem.model.load_state_dict(model.state_dict())
    optimizer = StellaAdamW(model, factors=stiefel_factors(model), **PLAIN)
    problem.train(model, optimizer, optimizer.step, 0, 3)
    assert distance(values(model), values(fused(problem, 3, grad_scaling=40)[0])) < 1e-14
    assert isinstance(model.first, Adapter)

"""``StellaAdamW`` against the published step around torch's AdamW, option by option; the operator; its errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stiefel_problem import (
    F64,
    HIDDEN,
    Adapter,
    Model,
    Problem,
    distance,
    identical,
    orthonormal,
    published,
    values,
    worst_error,
)
from torch import Tensor, nn
from torch.optim import AdamW

from stella_kernels import ops
from stella_kernels.checks import NonFiniteError
from stella_kernels.nn import StiefelFactor, stiefel_factors
from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.reference import adamw as reference
from stella_kernels.reference import stiefel
from stella_kernels.reference.step import PublishedStep

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.0}


def fused(problem: Problem, steps: int, dtype: torch.dtype = F64, **kwargs: Any) -> tuple[Model, StellaAdamW]:
    model = problem.copy(dtype)
    optimizer = StellaAdamW(model, **{**PLAIN, **kwargs})
    problem.train(model, optimizer, optimizer.step, 0, steps)
    return model, optimizer


def torch_adamw(**kwargs: Any) -> Callable[..., AdamW]:
    return lambda parameters: AdamW(parameters, **{**PLAIN, **kwargs})


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    return copy.deepcopy(optimizer.state_dict()["state"])


def same_state(a: dict[int, dict[str, Tensor]], b: dict[int, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k][key], b[k][key]) for k in b for key in b[k])


# --- the operator ---

OPERATORS = {
    "dispatched": lambda *args: torch.ops.stella_kernels.stella_adamw_(*args),
    "reference": lambda *args: ops.REFERENCE["stella_adamw_"](*args),
}
SHAPES = [(1, 1), (5, 5), (37, 4), (130, 16), (300, 33), (64, 1)]
ROWS = [[1e-2, 0.9, 0.999, 1e-8, 3.0, 1.7, 1.0], [3e-3, 0.8, 0.99, 1e-6, 7.0, 0.6, -1.0]]


class Case:
    """Arguments of the operator on fresh random factors, alternately of either storage; every other K is given."""

    def __init__(self, dtype: torch.dtype, shapes: list[tuple[int, int]] = SHAPES) -> None:
        self.lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        for i, (n, r) in enumerate(shapes):
            Y, G = orthonormal(n, r).to(dtype), torch.randn(n, r, dtype=F64).to(dtype)
            m, v = 0.1 * torch.randn(n, r, dtype=F64).to(dtype), torch.rand(n, r, dtype=F64).to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            K = (G.to(wide).mT @ Y.to(wide)) if i % 2 else Y.new_empty(0)
            stored = [t.mT.contiguous().mT if i % 3 == 1 else t for t in (Y, G, m, v)]
            for values_of_kind, value in zip(self.lists, [*stored, K], strict=True):
                values_of_kind.append(value)
        self.hyperparameters = torch.tensor([ROWS[i % 2] for i in range(len(shapes))], dtype=F64)

    def arguments(self, skip_nonfinite: bool = False) -> tuple[Any, ...]:
        return (*self.lists, self.hyperparameters, skip_nonfinite)

    def expected(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(Y, m, v) after the step, in float64."""
        results = []
        for *given, _, row in zip(*self.lists, self.hyperparameters.tolist(), strict=True):
            names = ("lr", "beta1", "beta2", "eps", "step", "divisor", "sign")
            exact = reference.riemannian_adamw_step(*(t.double() for t in given), **dict(zip(names, row, strict=True)))
            results.append(exact)
        return results


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_operator_equals_the_float64_reference(operator: str, dtype: torch.dtype) -> None:
    """Y, m and v to 32 roundings, relative in norm, and to one of the storage dtype.

    g takes two products of length n and r, whose errors grow with their square roots at worst (r ≤ 33, and the rows
    of Y have norm sqrt(r/n)), so g, m, v stay within some ten eps; the retraction adds a few. The move enters Y at
    lr = 1e-2, so that an error of it counts for less: a v so small that m / sqrt(v) blows one up is no matter.
    """
    case = Case(dtype)
    expected = case.expected()
    gradients = [g.clone() for g in case.lists[1]]
    info = OPERATORS[operator](*case.arguments())
    half = dtype in (torch.bfloat16, torch.float16)
    arithmetic = torch.float32 if half else dtype
    tolerance = 32 * torch.finfo(arithmetic).eps + (torch.finfo(dtype).eps if half else 0)
    for (Y, m, v), got_Y, got_m, got_v in zip(expected, *(case.lists[i] for i in (0, 2, 3)), strict=True):
        for exact, got in ((Y, got_Y), (m, got_m), (v, got_v)):
            assert float(torch.linalg.norm(got.double() - exact)) <= tolerance * float(torch.linalg.norm(exact))
    assert bool((info[:, 0] == 0).all())
    assert info.shape == (len(SHAPES), 4)
    assert info.dtype == F64
    assert all(torch.equal(g, before) for g, before in zip(case.lists[1], gradients, strict=True))


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operator_writes_nothing_beside_a_nan_or_all_the_others(operator: str) -> None:
    case = Case(torch.float32)
    case.lists[1][2][3, 1] = math.nan
    case.lists[1][4][5, 0] = -math.inf
    before = copy.deepcopy(case.lists)
    info = OPERATORS[operator](*case.arguments(skip_nonfinite=False))
    assert info[:, 0].tolist() == [0, 0, 1, 0, 1, 0]
    for kept, now in zip(before, case.lists, strict=True):
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, now, strict=True))
    sound = copy.deepcopy(case)
    for kept in sound.lists:
        for i in (4, 2):
            kept.pop(i)
    sound.hyperparameters = sound.hyperparameters[[0, 1, 3, 5]]
    OPERATORS[operator](*sound.arguments())
    info = OPERATORS[operator](*case.arguments(skip_nonfinite=True))
    assert info[:, 0].tolist() == [0, 0, 1, 0, 1, 0]
    for kind in (0, 2, 3):
        for i, j in enumerate((0, 1, 3, 5)):
            # other work may be shared among threads otherwise: round-off
            assert torch.allclose(case.lists[kind][j], sound.lists[kind][i], rtol=1e-5, atol=1e-6)
            assert not torch.equal(case.lists[kind][j], before[kind][j]) or kind != 2
        for i in (2, 4):
            assert torch.equal(case.lists[kind][i].nan_to_num(), before[kind][i].nan_to_num())


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("where", [0, 2, 3])
def test_operator_does_not_move_a_factor_to_nan(operator: str, where: int) -> None:
    """``where``: NaN in a factor or in a moment; the other factors take their step."""
    case = Case(torch.float32)
    case.lists[where][3][2, 1] = math.nan
    before = copy.deepcopy(case.lists[0])
    info = OPERATORS[operator](*case.arguments())
    assert info[:, 0].tolist() == [0, 0, 0, 1, 0, 0]
    assert torch.equal(case.lists[0][3].nan_to_num(), before[3].nan_to_num())
    assert all(bool(case.lists[0][i].isfinite().all()) for i in (0, 1, 2, 4, 5))
    assert not torch.equal(case.lists[0][4], before[4])


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operator_takes_no_factors(operator: str) -> None:
    info = OPERATORS[operator]([], [], [], [], [], torch.empty(0, 7, dtype=F64), False)
    assert info.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_declares_what_it_does(dtype: torch.dtype) -> None:
    case = Case(dtype, [(37, 4), (20, 3)])
    torch.library.opcheck(torch.ops.stella_kernels.stella_adamw_.default, case.arguments())


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
    U, Vt = nn.Parameter(orthonormal(n, r, torch.float32)), nn.Parameter(orthonormal(n, r, torch.float32).mT.clone())
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
    assert optimizer.last_info.shape == (2, 4)
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


# --- state ---


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


def test_loading_in_place_goes_on_bitwise() -> None:
    problem = Problem()
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
def test_a_non_finite_gradient_is_skipped_and_counted(mixed: bool) -> None:
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
                q.grad = None
        optimizer.step()
        sound.step()
        if index == 0:
            assert model.second.Vt not in optimizer.state
    # the operator may share its work among threads otherwise: round-off of two dtypes
    assert distance(values(model), values(twin)) < (1e-5 if mixed else 1e-12)
    assert optimizer.skipped == {"second.Vt": 2}
    assert [float(s["step"]) for s in (optimizer.state[p] for p in model.parameters())] == [4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("where", ["value", "moment"])
def test_a_non_finite_factor_is_named(where: str, skip_nonfinite: bool) -> None:
    problem = Problem()
    model, optimizer = fused(problem, 1, skip_nonfinite=skip_nonfinite)
    with torch.no_grad():
        (model.first.Vt if where == "value" else optimizer.state[model.first.Vt]["exp_avg"])[0, 0] = math.nan
    before = model.first.Vt.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    message = "the value of first.Vt holds NaN" if where == "value" else "it overflowed"
    with pytest.raises(NonFiniteError, match=rf"not taken for first\.Vt, since {message}") as caught:
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

"""``attach`` against the published step, with every kind of optimizer."""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import attach
from stella_kernels.reference import stiefel
from stella_kernels.reference.step import PublishedStep
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


# --- the same trajectory as published ---


@pytest.mark.parametrize("build", ["adamw", "sgd_momentum"])
def test_float32_equals_the_published_step_to_roundoff(build: str) -> None:
    """50 steps in float32: attach may stray from the float64 trajectory as the float32 reference does, not further.

    Both round off each step alike, and the problem amplifies what came before alike, whatever its (unknown) condition;
    so the reference's own float32 error measures what is allowed. 8 times it, as two draws of one random walk differ,
    plus what 50 roundings of a factor of norm sqrt(r) = 2 make when nothing is amplified.
    """
    problem, steps = Problem(), 50
    exact = published(problem, OPTIMIZERS[build], steps, F64, hidden_size=HIDDEN)
    single = published(problem, OPTIMIZERS[build], steps, torch.float32, hidden_size=HIDDEN)
    model, _ = hooked(problem, OPTIMIZERS[build], steps, torch.float32)
    own = distance(values(single), values(exact))
    floor = steps * torch.finfo(torch.float32).eps * 2
    assert own < 1e-3  # else the comparison would say nothing
    assert distance(values(model), values(exact)) < 8 * own + floor
    # the last retraction alone decides the residual: sqrt(nr) products of r ≤ 4 columns of length n ≤ 17
    assert worst_error(model) < 8 * torch.finfo(torch.float32).eps * math.sqrt(17 * 4)


@pytest.mark.parametrize("build", sorted(OPTIMIZERS))
def test_float64_equals_the_published_step(build: str) -> None:
    """20 steps: 1e-10 is 1e5 roundings, room for the amplification that the float32 test measures, and no more."""
    problem = Problem()
    reference = published(problem, OPTIMIZERS[build], 20, F64, hidden_size=HIDDEN)
    model, _ = hooked(problem, OPTIMIZERS[build], 20, F64)
    assert distance(values(model), values(problem.model)) > 1e-2  # it did move
    assert distance(values(model), values(reference)) < 1e-10


@pytest.mark.parametrize("method", ["auto", "newton_schulz", "svd"])
def test_every_method(method: str) -> None:
    problem = Problem()
    reference = published(problem, OPTIMIZERS["adamw"], 20, F64, hidden_size=HIDDEN)
    model, _ = hooked(problem, OPTIMIZERS["adamw"], 20, F64, method=method)
    assert distance(values(model), values(reference)) < 1e-10


@pytest.mark.parametrize("retraction", sorted(stiefel.RETRACTIONS))
@pytest.mark.parametrize(("grad_scaling", "hidden_size"), [(False, None), (40, 40.0), (True, HIDDEN)])
def test_every_retraction_and_scaling(retraction: str, grad_scaling: bool | float, hidden_size: float | None) -> None:
    problem, build = Problem(), OPTIMIZERS["sgd_momentum"]
    reference = published(problem, build, 10, F64, hidden_size=hidden_size, retraction=retraction)
    model, attachment = hooked(problem, build, 10, F64, grad_scaling=grad_scaling, retraction=retraction)
    assert distance(values(model), values(reference)) < 1e-10
    assert worst_error(model) < 1e-13
    assert attachment.last_info is not None
    assert attachment.last_info.shape == (4, 5)
    assert bool((attachment.last_info[:, 0] == 0).all())
    assert float(attachment.last_info[:, 1].max()) < 1e-13


def test_scalings_and_retractions_differ() -> None:
    """Else the test above could not fail."""
    problem, build = Problem(), OPTIMIZERS["sgd_momentum"]
    plain = values(hooked(problem, build, 3, F64, grad_scaling=False)[0])
    for kwargs in ({"grad_scaling": 40}, {"grad_scaling": False, "retraction": "qr"}):
        assert distance(values(hooked(problem, build, 3, F64, **kwargs)[0]), plain) > 1e-6


def test_training_lowers_the_loss() -> None:
    problem = Problem(batches=1)
    model, _ = hooked(problem, OPTIMIZERS["adamw"], 60, torch.float32)
    assert problem.loss(model, 0).item() < 0.9 * problem.loss(problem.copy(), 0).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_half_precision_factors_stay_as_orthonormal_as_their_dtype_allows(retraction: str, dtype: torch.dtype) -> None:
    """Rounding Q to the dtype, relative error at most eps/2, moves QᵀQ by at most eps sqrt(r) and a little."""
    problem = Problem()
    model, _ = hooked(problem, OPTIMIZERS["sgd_momentum"], 10, dtype, retraction=retraction)
    assert distance(values(model), values(problem.model)) > 1e-2
    assert worst_error(model) < 1.1 * torch.finfo(dtype).eps * 2


def test_euclidean_geometry_is_the_bare_optimizer() -> None:
    problem, build = Problem(), lambda p: AdamW(p, lr=1e-2)  # weight decay is nothing to refuse here
    bare = problem.copy()
    optimizer = build(bare.parameters())
    problem.train(bare, optimizer, optimizer.step, 0, 5)
    model, attachment = hooked(problem, build, 5, F64, geometry="euclidean")
    assert identical(values(model), values(bare))
    reference = published(problem, build, 5, F64, geometry="euclidean")
    assert identical(values(model), values(reference))
    attachment.remove()


def test_gradient_accumulation_equals_the_whole_batch() -> None:
    problem = Problem()
    whole, parts = problem.copy(), problem.copy()
    for model, pieces in ((whole, 1), (parts, 3)):
        optimizer = OPTIMIZERS["sgd_momentum"](model.parameters())
        attach(optimizer, model)
        for x, target in problem.batches[:5]:
            optimizer.zero_grad()
            for xs, ts in zip(x.chunk(pieces), target.chunk(pieces), strict=True):
                ((model(xs) - ts).square().mean() / pieces).backward()
            optimizer.step()
    assert distance(values(parts), values(whole)) < 1e-12  # sums in another order, five steps


def test_scheduler_and_several_groups() -> None:
    problem = Problem()

    def build(model: Model) -> Optimizer:
        constrained = [f.parameter for f in stiefel_factors(model)]
        return AdamW(
            [
                {"params": [model.first.S, model.second.S], "weight_decay": 0.1},
                {"params": constrained[:1], "lr": 5e-3, "weight_decay": 0.0},
                {"params": constrained[1:], "weight_decay": torch.tensor(0.0)},
            ],
            lr=1e-2,
        )

    models = problem.copy(), problem.copy()
    optimizers = [build(m) for m in models]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    stepper = PublishedStep(optimizers[1], stiefel_factors(models[1]), hidden_size=HIDDEN)
    attach(optimizers[0], models[0])
    for index in range(6):
        for model, optimizer, step in zip(models, optimizers, (optimizers[0].step, stepper.step), strict=True):
            problem.train(model, optimizer, step, index, index + 1)
        for scheduler in schedulers:
            scheduler.step()
    assert distance(values(models[0]), values(models[1])) < 1e-11


def test_factors_without_gradient_are_left_alone() -> None:
    problem = Problem()
    model = problem.copy()
    with torch.no_grad():  # within the tolerance of attach, but a retraction would move it
        model.second.U.mul_(1 + 1e-15)
    before = values(model)
    optimizer = OPTIMIZERS["sgd_momentum"](model.parameters())
    attachment = attach(optimizer, model)
    x, _ = problem.batches[0]
    model.first(x).square().sum().backward()
    optimizer.step()
    after = values(model)
    assert torch.equal(after["second.U"], before["second.U"])
    assert torch.equal(after["second.Vt"], before["second.Vt"])
    assert not torch.equal(after["first.U"], before["first.U"])
    assert attachment.last_info is not None
    assert attachment.last_info.shape == (2, 5)
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient
    assert identical(values(model), after)


def test_several_attachments_on_one_optimizer() -> None:
    problem, build = Problem(), OPTIMIZERS["adamw"]
    reference = published(problem, build, 5, F64, hidden_size=HIDDEN)
    model = problem.copy()
    optimizer = build(model.parameters())
    first = attach(optimizer, model.first, grad_scaling=HIDDEN)
    second = attach(optimizer, stiefel_factors(model.second), grad_scaling=HIDDEN)
    assert [f.name for f in first.factors + second.factors] == ["U", "Vt", "U", "Vt"]
    problem.train(model, optimizer, optimizer.step, 0, 5)
    assert distance(values(model), values(reference)) < 1e-11


def test_mixed_dtypes_in_one_attachment() -> None:
    build = OPTIMIZERS["sgd_momentum"]
    tall = [nn.Parameter(orthonormal(9, 3)), nn.Parameter(orthonormal(8, 2, dtype=torch.float32))]
    alone = [nn.Parameter(p.detach().clone()) for p in tall]
    together = build(tall)
    attach(together, tall, grad_scaling=False)
    apart = [build([p]) for p in alone]
    for p, optimizer in zip(alone, apart, strict=True):
        attach(optimizer, [p], grad_scaling=False)
    for _ in range(3):
        for p, q in zip(tall, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(tall, alone, strict=True))


def test_strided_parameters_and_gradients() -> None:
    """A factor that is a column slice of a larger array, with a gradient stored the other way round."""
    wide = torch.zeros(11, 6, dtype=F64)
    wide[:, 1:4] = orthonormal(11, 3)
    sliced = nn.Parameter(wide[:, 1:4])
    dense = nn.Parameter(sliced.detach().clone())
    gradient = torch.randn(3, 11, dtype=F64).mT
    for p in (sliced, dense):
        optimizer = SGD([p], lr=0.1)
        attach(optimizer, [p], grad_scaling=False)
        p.grad = gradient.clone() if p is sliced else gradient.contiguous()
        optimizer.step()
    assert torch.linalg.norm(sliced.detach() - dense.detach()) < 1e-14
    assert bool((wide[:, [0, 4, 5]] == 0).all())


def test_parameters_that_move_to_other_memory_are_followed() -> None:
    problem, build = Problem(), OPTIMIZERS["sgd_momentum"]
    model = problem.copy(torch.float32)
    optimizer = build(model.parameters())
    attach(optimizer, model)
    problem.train(model, optimizer, optimizer.step, 0, 2)
    model.to(F64)
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    problem.train(model, optimizer, optimizer.step, 2, 4)
    assert model.first.U.dtype == F64
    assert worst_error(model) < 1e-13


def test_snapshot_memory_is_reused() -> None:
    problem, build = Problem(), OPTIMIZERS["adamw"]
    model = problem.copy()
    optimizer = build(model.parameters())
    attachment = attach(optimizer, model)
    problem.train(model, optimizer, optimizer.step, 0, 1)
    first = [b.data_ptr() for b in attachment._snapshot if b is not None]
    problem.train(model, optimizer, optimizer.step, 1, 3)
    assert first == [b.data_ptr() for b in attachment._snapshot if b is not None]
    assert len(first) == 4


def test_one_operator_call_for_all_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    namespace = torch.ops.stella_kernels
    for name in ("riemannian_gradient_", "project_retract_"):
        operator = getattr(namespace, name)

        def counted(tensors: list[Tensor], *args: Any, _op: Any = operator, _name: str = name) -> Tensor:
            calls.append((_name, len(tensors)))
            return _op(tensors, *args)

        monkeypatch.setattr(namespace, name, counted)
    hooked(Problem(), OPTIMIZERS["adamw"], 2, torch.float32)
    assert calls == [("riemannian_gradient_", 4), ("project_retract_", 4)] * 2


# --- gradient scaler ---


@pytest.mark.parametrize("build", ["adamw_loop", "adamw_fused"])
def test_grad_scaler(build: str) -> None:
    """Scaled by a power of two and unscaled (by the scaler or by the fused step), then a batch that overflows."""
    problem = Problem()
    reference = published(problem, OPTIMIZERS["adamw_loop"], 4, torch.float32, hidden_size=HIDDEN)
    model = problem.copy(torch.float32)
    optimizer = OPTIMIZERS[build](model.parameters())
    attach(optimizer, model)
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
    assert distance(values(model), values(reference)) < 1e-4  # float32, four steps
    before = values(model)
    step(4, spoil=True)
    assert identical(values(model), before)
    assert scaler.get_scale() == 512.0
    step(5)
    assert not identical(values(model), before)
    assert worst_error(model) < 1e-5


# --- attach and remove ---


def test_remove() -> None:
    problem = Problem()
    model = problem.copy()
    optimizer = SGD(model.parameters(), lr=0.1)
    attachment = attach(optimizer, model)
    with pytest.raises(ValueError, match=r"first\.U.*already attached.*remove"):
        attach(optimizer, stiefel_factors(model)[:1], grad_scaling=False)
    attachment.remove()
    attachment.remove()
    bare = problem.copy()
    other = SGD(bare.parameters(), lr=0.1)
    problem.train(model, optimizer, optimizer.step, 0, 3)
    problem.train(bare, other, other.step, 0, 3)
    assert identical(values(model), values(bare))
    model.load_state_dict(problem.model.state_dict())
    attach(optimizer, model)
    problem.train(model, optimizer, optimizer.step, 0, 3)
    assert worst_error(model) < 1e-13


def test_nothing_keeps_optimizer_or_model_alive() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    watched = weakref.ref(optimizer), weakref.ref(model)
    del optimizer, model
    gc.collect()
    assert [w() for w in watched] == [None, None]


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step()

        @property
        def param_groups(self) -> list[dict[str, Any]]:
            return self.optimizer.param_groups

    problem = Problem()
    model = problem.copy()
    wrapper = Wrapper(SGD(model.parameters(), lr=0.1))
    attach(wrapper, model)
    problem.loss(model, 0).backward()
    wrapper.step()
    assert not identical(values(model), values(problem.model))
    assert worst_error(model) < 1e-13


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SimpleNamespace(hidden_size=5), 5.0),
        ({"hidden_size": 6}, 6.0),
        (SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=7)), 7.0),
    ],
)
def test_hidden_size_is_read_from_the_configuration(config: Any, expected: float) -> None:
    problem, build = Problem(), OPTIMIZERS["sgd_momentum"]
    problem.model.config = config
    model, _ = hooked(problem, build, 3, F64)
    other, _ = hooked(problem, build, 3, F64, grad_scaling=expected)
    assert identical(values(model), values(other))


@pytest.mark.parametrize("config", [None, {"model_type": "custom"}, SimpleNamespace(hidden_size=None)])
def test_unknown_hidden_size_is_an_error_with_advice(config: Any) -> None:
    model = Model()
    model.config = config
    with pytest.raises(ValueError, match=r"grad_scaling: True takes the model's hidden size.*grad_scaling=d"):
        attach(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="grad_scaling: True"):
        attach(SGD(model.parameters(), lr=0.1), stiefel_factors(model))

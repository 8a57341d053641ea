"""``attach(geometry='quotient')``: the reference's steps, no motion along the fibre, and what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stella_kernels.checks import NonFiniteError
from stella_kernels.nn import StellaLinear, StiefelFactor, stiefel_factors
from stella_kernels.optim import attach
from stella_kernels.reference import quotient, stiefel
from stella_kernels.reference.step import PublishedStep
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
HIDDEN = 12


class Model(nn.Module):
    """Two adapters in float64; as drawn, away from S = I."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=HIDDEN)
        self.first = StellaLinear(nn.Linear(13, 17, dtype=F64), r=4, dtype=F64)
        self.second = StellaLinear(nn.Linear(17, 9, dtype=F64), r=3, dtype=F64)
        with torch.no_grad():
            self.first.S.add_(0.3 * torch.randn(4, 4))
            self.second.S.add_(0.3 * torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float(torch.linalg.norm(a[name].double() - b[name].double())) for name in b)


def descend(
    model: nn.Module, optimizer: Optimizer, step: Callable[[], Any], batches: list[tuple[Tensor, Tensor]]
) -> None:
    for x, target in batches:
        optimizer.zero_grad()
        (model(x.to(trained(model)[0].dtype)) - target).square().mean().backward()
        step()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(24, 13, dtype=F64), torch.randn(24, 9, dtype=F64)) for _ in range(count)]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=2e-2, weight_decay=0.0),
    "sgd_momentum": lambda p: SGD(p, lr=5e-2, momentum=0.9),
}


@pytest.mark.parametrize("build", sorted(OPTIMIZERS))
@pytest.mark.parametrize("retraction", sorted(stiefel.RETRACTIONS))
@pytest.mark.parametrize(("grad_scaling", "hidden_size"), [(False, None), (True, HIDDEN)])
def test_equals_the_reference_step(build: str, retraction: str, grad_scaling: bool, hidden_size: float | None) -> None:
    """10 steps in float64: 1e-9 is 1e6 roundings, room for what the damped systems and the problem amplify."""
    start, data = Model(), batches(10)
    models = [copy.deepcopy(start) for _ in range(2)]
    optimizers = [OPTIMIZERS[build](trained(m)) for m in models]
    reference = PublishedStep(optimizers[0], stiefel_factors(models[0]), retraction, hidden_size, "quotient")
    descend(models[0], optimizers[0], reference.step, data)
    attachment = attach(optimizers[1], models[1], retraction=retraction, grad_scaling=grad_scaling, geometry="quotient")
    descend(models[1], optimizers[1], optimizers[1].step, data)
    assert distance(values(models[0]), values(start)) > 1e-2
    assert distance(values(models[1]), values(models[0])) < 1e-9
    assert attachment.last_info is not None
    assert attachment.last_info.shape == (4, 5)
    assert float(attachment.last_info[:, 1].max()) < 1e-13
    for f in stiefel_factors(models[1]):
        assert float(stiefel.orthonormality_error(f.view)) < 1e-13


def test_a_step_is_orthogonal_to_the_fibre_whatever_the_optimizer_does() -> None:
    """A retraction is its move up to second order: at lr = 1e-6 what it adds is 1e-6 of the move."""
    model = Model()
    before = copy.deepcopy(model)
    optimizer = AdamW(trained(model), lr=1e-6, weight_decay=0.0)
    attach(optimizer, model, grad_scaling=40, geometry="quotient")
    descend(model, optimizer, optimizer.step, batches(1))
    for new, old in ((model.first, before.first), (model.second, before.second)):
        point = old.U.detach(), old.S.detach(), old.Vt.detach().mT
        now = new.U.detach(), new.S.detach(), new.Vt.detach().mT
        move = tuple((a - b) / 1e-6 for a, b in zip(now, point, strict=True))
        skew = [M - M.mT for M in torch.randn(2, old.r, old.r, dtype=F64)]
        along = quotient.vertical(point, skew[0], skew[1])
        inner = float(quotient.inner_product(point[1], move, along))  # type: ignore[arg-type]
        size = math.sqrt(sum(float(t.square().sum()) for t in move))
        assert size > 1.0
        assert abs(inner) < 1e-4 * size * math.sqrt(sum(float(t.square().sum()) for t in along))


def test_training_from_any_point_of_a_fibre_trains_the_same_weight() -> None:
    """With SGD, whose step turns with the gradient. AdamW's does not, and neither does a step on the two manifolds."""
    start, data = Model(), batches(10)
    turned = copy.deepcopy(start)
    with torch.no_grad():
        for layer in (turned.first, turned.second):
            O, P = (orthonormal(layer.r, layer.r) for _ in range(2))  # noqa: E741
            layer.U.copy_(layer.U @ O)
            layer.S.copy_(O.mT @ layer.S @ P)
            layer.Vt.copy_(P.mT @ layer.Vt)

    def weights(geometry: str) -> list[Tensor]:
        merged = []
        for model in (copy.deepcopy(start), copy.deepcopy(turned)):
            optimizer = SGD(trained(model), lr=0.1, momentum=0.0)
            attach(optimizer, model, geometry=geometry)
            descend(model, optimizer, optimizer.step, data)
            merged.append(torch.cat([model.first.merged_weight().flatten(), model.second.merged_weight().flatten()]))
        return merged

    ours, other = weights("quotient")
    assert torch.linalg.norm(ours - other) < 1e-9
    plain, _ = weights("stiefel")
    assert torch.linalg.norm(ours - plain) > 1e-3  # another geometry is another path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_stay_on_the_manifold(dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    optimizer = SGD(trained(model), lr=5e-2)
    attach(optimizer, model, geometry="quotient")
    before = values(model)
    descend(model, optimizer, optimizer.step, batches(5))
    assert distance(values(model), before) > 1e-2
    for f in stiefel_factors(model):  # rounding of Q, and the arithmetic of 17 x 4 in float32
        bound = 1.1 * torch.finfo(dtype).eps * 2 + 8 * torch.finfo(torch.float32).eps * math.sqrt(17 * 4)
        assert float(stiefel.orthonormality_error(f.view.double())) < bound


# --- refused, nothing changed ---


def test_targets_that_are_no_products_are_refused() -> None:
    def refused(model: nn.Module, target: Any, message: str) -> None:
        optimizer = SGD(trained(model), lr=0.1)
        with pytest.raises(ValueError, match=message):
            attach(optimizer, target, grad_scaling=False, geometry="quotient")
        attach(optimizer, target, grad_scaling=False)  # not half attached

    diagonal = StellaLinear(nn.Linear(6, 5), r=2, diag_s=True)
    refused(diagonal, diagonal, "U and Vt: found a diagonal S, wanted a full one")
    half = StellaLinear(nn.Linear(6, 5), r=2)
    half.Vt.requires_grad_(False)
    refused(half, half, "U: found no trained partner")
    frozen = StellaLinear(nn.Linear(6, 5), r=2)
    frozen.S.requires_grad_(False)
    refused(frozen, frozen, "U and Vt: found an S that is not trained")
    alone = StellaLinear(nn.Linear(6, 5), r=2)
    refused(alone, [StiefelFactor(alone.U, False, "alone")], "alone: found a factor without its S")
    mixed = StellaLinear(nn.Linear(6, 5), r=2)
    mixed.S = nn.Parameter(mixed.S.detach().double())
    refused(mixed, mixed, r"found U, S, V of .*wanted one dtype and one device")
    model = Model()
    with pytest.raises(ValueError, match=r"optimizer: it does not hold the S of first\.U and first\.Vt"):
        attach(SGD([p for p in trained(model) if p is not model.first.S], lr=0.1), model, geometry="quotient")


@pytest.mark.parametrize("spoilt", ["gradient of U", "gradient of S", "missing gradient"])
def test_bad_gradients_stop_everything(spoilt: str) -> None:
    model = Model()
    optimizer = OPTIMIZERS["adamw"](trained(model))
    attach(optimizer, model, geometry="quotient")
    for p in trained(model):
        p.grad = torch.randn_like(p)
    if spoilt == "missing gradient":
        model.second.S.grad = None
    else:
        (model.second.U if spoilt.endswith("U") else model.second.S).grad[1, 1] = math.nan  # type: ignore[index]
    before, gradient = values(model), model.first.U.grad.clone()  # type: ignore[union-attr]
    with pytest.raises((NonFiniteError, RuntimeError), match=r"second\.U"):
        optimizer.step()
    assert distance(values(model), before) == 0.0
    assert torch.equal(model.first.U.grad, gradient)  # type: ignore[arg-type]
    assert not optimizer.state


def test_factors_and_cores_come_back_when_the_optimizer_writes_nan() -> None:
    class Spoiling(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            with torch.no_grad():
                model.second.S[0, 0] = math.nan

    model = Model()
    optimizer = Spoiling(trained(model), lr=0.1)
    attach(optimizer, model, geometry="quotient")
    before = values(model)
    with pytest.raises(NonFiniteError, match=r"moved the S of second\.U and second\.Vt"):
        descend(model, optimizer, optimizer.step, batches(1))
    assert distance(values(model), before) == 0.0


def test_a_product_without_gradients_stays() -> None:
    model = Model()
    optimizer = OPTIMIZERS["sgd_momentum"](trained(model))
    attachment = attach(optimizer, model, geometry="quotient")
    before = values(model)
    model.first(torch.randn(3, 13, dtype=F64)).square().sum().backward()
    optimizer.step()
    after = values(model)
    assert attachment.last_info is not None
    assert len(attachment.last_info) == 2
    for name in ("U", "S", "Vt"):
        assert torch.equal(after[f"second.{name}"], before[f"second.{name}"])
        assert not torch.equal(after[f"first.{name}"], before[f"first.{name}"])

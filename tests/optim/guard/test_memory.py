"""Memory that is taken away, given back, or exchanged under the optimizer; values that are not what they should be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stella_kernels import StellaLinear
from stella_kernels.checks import NonFiniteError, OffManifoldError
from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW, attach, retract
from tests.optim.stiefel_problem import identical, values
from tests.optim.test_foreign_moves import GROUPS, off

KINDS = ["attach", "fused"]


def layer_and_optimizer(kind: str, layers: int = 1, **kwargs: Any) -> tuple[nn.Sequential, Optimizer]:
    model = nn.Sequential(*(StellaLinear(nn.Linear(24, 24), r=4) for _ in range(layers)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "fused":
        return model, StellaAdamW(parameters, factors=model, grad_scaling=False, **GROUPS, **kwargs)
    optimizer = AdamW(parameters, **GROUPS)
    attach(optimizer, model, grad_scaling=False, **kwargs)
    return model, optimizer


def backward(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 24)).square().mean().backward()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def reload(tensors: list[Tensor]) -> None:
    """Free the storages and put the values elsewhere, mostly where they were: what was freed is given out again."""
    kept = [t.detach().clone() for t in tensors]
    for t in tensors:
        t.data.untyped_storage().resize_(0)
    for t, value in zip(tensors, kept, strict=True):
        t.data = value.clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["parameters", "moments", "both"])
def test_storage_that_is_freed_and_reloaded_between_steps(kind: str, what: str) -> None:
    models = []
    for offloads in (True, False):
        torch.manual_seed(0)
        model, optimizer = layer_and_optimizer(kind)
        for _ in range(8):
            backward(model, optimizer)
            optimizer.step()
            if offloads and what != "moments":
                reload(trained(model))
            if offloads and what != "parameters":
                reload([s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")])
        models.append(model)
    assert identical(values(models[0]), values(models[1]))


class Offloading(SGD):
    """Frees the memory of its parameters as it steps, and brings it back, or not."""

    back = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        parameters = self.param_groups[0]["params"]
        if self.back:
            reload(parameters)
        else:
            parameters[0].data.untyped_storage().resize_(0)


@pytest.mark.parametrize("geometry", ["stiefel", "quotient"])
def test_storage_that_is_freed_within_the_step(geometry: str) -> None:
    model = StellaLinear(nn.Linear(24, 24), r=4)
    optimizer = Offloading([model.U, model.S, model.Vt], lr=0.1)
    attach(optimizer, model, grad_scaling=False, geometry=geometry)
    for _ in range(6):
        backward(model, optimizer)
        optimizer.step()
        assert off(model) < 1
    backward(model, optimizer)
    optimizer.back = False
    with pytest.raises(OffManifoldError, match=r"U: found .* storage of 0 bytes.*within optimizer\.step\(\)"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["parameter", "gradient", "moment"])
def test_storage_that_is_freed_and_not_brought_back_is_an_error(kind: str, what: str) -> None:
    if kind == "attach" and what == "moment":
        pytest.skip("torch's own optimizer reads its moments")
    model, optimizer = layer_and_optimizer(kind)
    backward(model, optimizer)
    optimizer.step()
    backward(model, optimizer)
    U = model[0].U
    tensor = {"parameter": U, "gradient": U.grad, "moment": optimizer.state[U]["exp_avg"]}[what]
    kept = tensor.detach().clone()
    tensor.data.untyped_storage().resize_(0)
    with pytest.raises((OffManifoldError, RuntimeError, ValueError), match=r"0\.U: found .*(0 bytes|was freed)"):
        optimizer.step()
    tensor.data = kept
    optimizer.step()
    assert off(model) < 1


def test_attach_refuses_a_factor_without_memory() -> None:
    model = StellaLinear(nn.Linear(24, 24), r=4)
    model.U.data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="U: found a parameter whose storage was freed"):
        StellaAdamW(model, grad_scaling=False)
    with pytest.raises(ValueError, match="U: found a parameter whose storage was freed"):
        attach(SGD([model.U, model.Vt], lr=0.1), model, grad_scaling=False)


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("swapping")
def test_tensors_that_are_swapped(kind: str) -> None:
    model, optimizer = layer_and_optimizer(kind)
    for _ in range(3):
        backward(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    backward(model, optimizer)
    optimizer.step()
    for p in trained(model):
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
    backward(model, optimizer)
    before = values(model)
    optimizer.step()
    assert not identical(values(model), before)
    assert off(model) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["error", "retract"])
@pytest.mark.parametrize("how", ["zero", "offloaded", "freed"])
def test_a_frozen_layer_may_be_changed_and_is_judged_when_it_trains_again(kind: str, policy: str, how: str) -> None:
    model, optimizer = layer_and_optimizer(kind, 2, on_foreign_move=policy)
    backward(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    frozen = model[0]
    kept = frozen.Vt.detach().clone()
    for p in (frozen.U, frozen.S, frozen.Vt):
        p.requires_grad_(False)
    if how == "zero":
        frozen.Vt.data.zero_()
    elif how == "offloaded":
        frozen.Vt.data = torch.empty(0)
    else:
        frozen.Vt.data.untyped_storage().resize_(0)
    for _ in range(3):
        optimizer.zero_grad()
        model[1](torch.ones(2, 24)).square().mean().backward()
        optimizer.step()
    if how == "zero":
        for p in (frozen.U, frozen.S, frozen.Vt):
            p.requires_grad_(True)
        backward(model, optimizer)
        with pytest.raises(OffManifoldError, match=r"0\.Vt: found"):
            optimizer.step()
    frozen.Vt.data = kept
    for p in (frozen.U, frozen.S, frozen.Vt):
        p.requires_grad_(True)
    for _ in range(2):
        backward(model, optimizer)
        optimizer.step()
    assert off(model) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("name", "message"), [("S", r"the S beside 0\.U"), ("U", r"0\.U")])
def test_a_value_that_is_not_finite_is_named_and_not_the_gradient(
    kind: str, skip: bool, name: str, message: str
) -> None:
    if skip and kind == "attach":
        pytest.skip("an option of StellaAdamW")
    model, optimizer = layer_and_optimizer(kind, 2, **({"skip_nonfinite": True} if skip else {}))
    backward(model, optimizer)
    optimizer.step()
    getattr(model[0], name).data[0, 0] = torch.nan
    backward(model, optimizer)
    before = values(model[1])
    with pytest.raises(NonFiniteError, match=rf"the value of {message} holds NaN .*load a sound checkpoint"):
        optimizer.step()
    assert identical(values(model[1]), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_data", [False, True])
def test_a_huge_finite_value_is_off_its_manifold(kind: str, by_data: bool) -> None:
    for policy in ("error", "retract"):
        model, optimizer = layer_and_optimizer(kind, on_foreign_move=policy)
        backward(model, optimizer)
        optimizer.step()
        backward(model, optimizer)
        U = model[0].U
        with torch.no_grad():
            (U.data if by_data else U).mul_(1e30)
        if policy == "error":
            with pytest.raises(OffManifoldError, match=r"0\.U"):
                optimizer.step()
        else:
            optimizer.step()
            assert off(model) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_of_data_between_steps_is_named(kind: str) -> None:
    model, optimizer = layer_and_optimizer(kind)
    backward(model, optimizer)
    optimizer.step()
    backward(model, optimizer)
    U = model[0].U
    gradient, U.grad = U.grad, None
    U.data = U.data.bfloat16()
    U.grad = gradient.bfloat16()
    with pytest.raises(ValueError, match=r"0\.U: found torch\.bfloat16, wanted torch\.float32"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_data", [False, True])
def test_a_move_not_far_above_round_off_is_found(kind: str, by_data: bool) -> None:
    model, optimizer = layer_and_optimizer(kind)
    backward(model, optimizer)
    optimizer.step()
    backward(model, optimizer)
    U = model[0].U
    with torch.no_grad():
        (U.data if by_data else U).mul_(1 + 1e-5)  # ‖QᵀQ − I‖ = 4e-5, where round-off is 1e-6
    with pytest.raises(OffManifoldError, match=r"0\.U: found"):
        optimizer.step()


def test_columns_that_are_dependent_have_no_nearest_point() -> None:
    model = StellaLinear(nn.Linear(24, 24), r=4)
    with torch.no_grad():
        model.U[:, 1] = model.U[:, 0]
        model.Vt.mul_(3)
    before = values(model)
    with pytest.raises(OffManifoldError, match=r"U: found 3 linearly independent columns of 4"):
        retract(model)
    assert identical(values(model), before)
    with torch.no_grad():
        model.U.copy_(torch.eye(24, 4) * 1e30)
        model.U[0, 1] = 1e25  # ill-conditioned, and no more
    retract(model)
    assert off(model) < 1
    model.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retract(model)
    assert len(stiefel_factors(model)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_other_strides_at_the_same_address_are_another_value(kind: str) -> None:
    """The memory is untouched and its version counter too: only what the factor is seen as has changed."""
    model, optimizer = layer_and_optimizer(kind)
    for _ in range(2):
        backward(model, optimizer)
        optimizer.step()
    factor = model[0].U
    factor.data = factor.data.as_strided((24, 4), (1, 24))
    backward(model, optimizer)
    with pytest.raises(OffManifoldError, match=r"U"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_core_without_storage_is_named(kind: str) -> None:
    model, optimizer = layer_and_optimizer(kind)
    backward(model, optimizer)
    before = values(model)
    model[0].S.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"of \(4, 4\) whose storage was freed"):
        optimizer.step()
    assert identical(values(model), before)


def test_a_cast_of_the_model_between_steps_is_a_choice() -> None:
    """``model.to(dtype)`` changes what the layers promise; a cast of ``.data`` breaks it."""
    model = nn.Sequential(StellaLinear(nn.Linear(24, 24), r=4))
    optimizer = SGD(trained(model), lr=1e-3)
    attach(optimizer, model, grad_scaling=False)
    for step in range(4):
        if step == 2:
            model.to(torch.bfloat16)
        optimizer.zero_grad()
        model(torch.ones(2, 24, dtype=model[0].U.dtype)).square().mean().backward()
        optimizer.step()
    assert model[0].U.dtype == torch.bfloat16


@pytest.mark.parametrize("what", ["gradient", "factor", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("kind", KINDS)
def test_storage_that_shrinks_under_its_tensor_is_named(kind: str, what: str) -> None:
    if kind == "attach" and what not in ("gradient", "factor"):
        pytest.skip("torch's own optimizer reads it")
    model, optimizer = layer_and_optimizer(kind)
    backward(model, optimizer)
    optimizer.step()
    backward(model, optimizer)
    U = model[0].U
    shrunk: dict[str, Tensor] = {"gradient": U.grad, "factor": U, **optimizer.state[U]}
    before = model[0].Vt.detach().clone()
    shrunk[what].untyped_storage().resize_(shrunk[what].element_size())
    with pytest.raises((RuntimeError, ValueError), match="storage"):
        optimizer.step()
    assert torch.equal(model[0].Vt, before)

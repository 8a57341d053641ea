"""Factors promised in full precision: what keeps the promise, changes it, breaks it, and mends it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stella_kernels.nn import StellaLinear, lost_masters, orthonormality_tolerance, restore_masters, stiefel_factors
from stella_kernels.optim import attach
from stella_kernels.reference.stiefel import orthonormality_error

HALF = (torch.bfloat16, torch.float16)


def cast_data(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As trainers do to all trainable parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def lost(model: nn.Module) -> list[str]:
    return lost_masters(stiefel_factors(model))


@pytest.mark.parametrize("made", [torch.float32, torch.float64, torch.bfloat16])
def test_the_promise_is_the_dtype_that_the_factors_are_made_in(made: torch.dtype) -> None:
    layer = StellaLinear(nn.Linear(9, 7), r=3, dtype=made)
    assert [f.master for f in stiefel_factors(layer)] == [made, made]
    assert lost(layer) == []
    assert lost(copy.deepcopy(layer)) == []


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_a_cast_of_the_module_is_a_choice(dtype: torch.dtype) -> None:
    model = nn.Sequential(StellaLinear(nn.Linear(9, 7), r=3)).to(dtype)
    assert lost(model) == []
    assert lost(model.to("cpu").float()) == []
    assert {f.master for f in stiefel_factors(model)} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF)
def test_a_cast_of_the_data_is_found_also_after_a_move(dtype: torch.dtype) -> None:
    model = cast_data(nn.Sequential(StellaLinear(nn.Linear(9, 7), r=3), nn.ReLU()), dtype)
    assert lost(model) == ["0.U", "0.Vt"]
    assert lost(model.to("cpu")) == ["0.U", "0.Vt"]
    assert lost(copy.deepcopy(model)) == ["0.U", "0.Vt"]
    assert lost(model.to(dtype)) == []  # asked for in so many words
    widened = cast_data(cast_data(StellaLinear(nn.Linear(9, 7), r=3), dtype), torch.float32)
    assert lost(widened) == []


def test_of_one_factor_only_that_one_is_named_and_other_modules_promise_nothing() -> None:
    layer = StellaLinear(nn.Linear(9, 7), r=3)
    layer.Vt.data = layer.Vt.data.bfloat16()
    assert lost(nn.ModuleDict({"a": layer})) == ["a.Vt"]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frame = nn.Parameter(torch.eye(4, 2, dtype=torch.bfloat16))

        def own_stiefel_factors(self):  # type: ignore[no-untyped-def]
            yield "frame", self.frame, False

    assert lost(Own()) == []


@pytest.mark.parametrize("as_factors", [False, True])
@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_masters_are_restored_in_place_and_can_be_attached(dtype: torch.dtype, diag_s: bool, as_factors: bool) -> None:
    model = nn.Sequential(StellaLinear(nn.Linear(90, 70), r=6, diag_s=diag_s), StellaLinear(nn.Linear(70, 70), r=70))
    with torch.no_grad():
        model[0].S.normal_()
    kept = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    cast_data(model, dtype)
    model[0].U.grad = torch.ones_like(model[0].U)
    assert restore_masters(stiefel_factors(model) if as_factors else model) == ["0.U", "0.Vt", "1.U", "1.Vt"]
    assert lost(model) == []
    assert model[0].U.grad.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32, name
        # rounded by eps/2 relative, and the nearest orthonormal matrix is no further than the kept one
        assert float((value - kept[name]).norm()) <= torch.finfo(dtype).eps * float(kept[name].norm()), name
    attach(optimizer, model, grad_scaling=False)  # orthonormal, and the same parameters
    assert restore_masters(model) == []


def test_factors_that_never_were_orthonormal_are_only_cast() -> None:
    layer = cast_data(StellaLinear(nn.Linear(9, 7), r=3), torch.bfloat16)
    layer.U.data.mul_(3)
    wanted = layer.U.detach().float()
    restore_masters(layer)
    assert torch.equal(layer.U, wanted)


# What a checkpoint may hold


def stored(layer: StellaLinear, name: str, value: Tensor) -> dict[str, Tensor]:
    return {**copy.deepcopy(layer.state_dict()), name: value}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_a_checkpoint_of_another_dtype_comes_back_to_the_manifold(dtype: torch.dtype, assign: bool) -> None:
    first, second = (StellaLinear(nn.Linear(90, 70), r=6, init="pseudo_zero") for _ in range(2))
    state = {key: value.to(dtype) if not key.startswith("base") else value for key, value in first.state_dict().items()}
    second.load_state_dict(state, assign=assign)
    assert lost(second) == []
    for name in ("U", "S", "Vt", "U0", "Vt0"):
        found, wanted = getattr(second, name).detach(), getattr(first, name).detach()
        assert found.dtype == torch.float32
        assert float((found - wanted).norm()) <= max(torch.finfo(dtype).eps, 1e-6) * float(wanted.norm())
    for factor in stiefel_factors(second):
        assert float(orthonormality_error(factor.view)) <= orthonormality_tolerance(factor)


@pytest.mark.parametrize("target", ["rando", "pseudo_zero"])
@pytest.mark.parametrize("name", ["U", "S", "Vt", "U0"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.flatten(), "size mismatch for {}"),
        (lambda t: t.flatten().bfloat16(), "size mismatch for {}"),
        (lambda t: t.half()[None], "size mismatch for {}"),
        (lambda t: t.bfloat16()[:-1], "size mismatch for {}"),
        (lambda t: t.to(torch.int8), "{}: found dtype torch.int8, wanted a floating-point tensor"),
        (lambda t: t.to(torch.complex64), "{}: found dtype torch.complex64"),
        (lambda t: t > 0, "{}: found dtype torch.bool"),
    ],
)
def test_what_does_not_fit_is_named(change, message: str, name: str, target: str) -> None:  # type: ignore[no-untyped-def]
    first = StellaLinear(nn.Linear(9, 7), r=3, init="pseudo_zero")
    layer = StellaLinear(nn.Linear(9, 7), r=3, init=target)
    before = copy.deepcopy(getattr(layer, name))
    with pytest.raises(RuntimeError, match=message.format(name)):
        layer.load_state_dict(stored(first, name, change(getattr(first, name).detach())))
    assert getattr(layer, name) is None if before is None else torch.equal(getattr(layer, name), before)


@pytest.mark.parametrize("diag_s", [False, True])
def test_a_full_and_a_diagonal_s_are_not_mistaken_for_one_another(diag_s: bool) -> None:
    first, second = (StellaLinear(nn.Linear(9, 7), r=1, diag_s=d) for d in (diag_s, not diag_s))
    with pytest.raises(RuntimeError, match="size mismatch for S"):
        second.load_state_dict(first.state_dict())

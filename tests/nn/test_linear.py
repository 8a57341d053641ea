"""StellaLinear, and how an optimizer finds its factors."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import stella_kernels as sk
from stella_kernels.nn import INITS, StellaLinear, stiefel_factors
from tests.functional.adapter_layers import DoubledLinear

EPS = torch.finfo(torch.float32).eps


def dense(layer: StellaLinear, x: Tensor) -> Tensor:
    """The layer's output from its parameters, in float64, dropout off."""
    U, S, Vt, W = (t.detach().double() for t in (layer.U, layer.S, layer.Vt, layer.base.weight))
    core = S.diag() if S.dim() == 1 else S
    bias = 0 if layer.base.bias is None else layer.base.bias.detach().double()
    product = U @ core @ Vt
    if layer.U0 is not None and layer.Vt0 is not None:
        product -= layer.U0.double() @ layer.Vt0.double()
    return x.detach().double() @ (W + layer.scale * product).mT + bias


# The module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_forward(init: str, diag_s: bool, bias: bool) -> None:
    layer = StellaLinear(nn.Linear(31, 17, bias=bias), r=5, alpha=7, diag_s=diag_s, init=init)
    assert layer.S.shape == ((5,) if diag_s else (5, 5))
    with torch.no_grad():  # away from the start, where S is the identity
        layer.S.add_(0.3 * torch.randn_like(layer.S))
    x = torch.randn(2, 3, 31)
    wanted = dense(layer, x)
    # three products of at most 31 terms, each off by length * sqrt(length) * eps / 2 of its norm (see test_adapter)
    assert (layer(x).double() - wanted).norm() <= 3 * 31 * math.sqrt(31) * EPS / 2 * wanted.norm()


def test_opaque_base_and_hooks_are_honoured() -> None:
    x = torch.randn(4, 7)
    doubled = StellaLinear(DoubledLinear(7, 5), r=2)
    plain = StellaLinear(nn.Linear(7, 5), r=2)
    plain.load_state_dict(doubled.state_dict())
    adapter = plain(x) - plain.base(x)
    # sums of at most 7 terms and three additions
    close = {"rtol": 0, "atol": 30 * EPS * float((adapter.abs().max() + plain(x).abs().max()).detach())}
    torch.testing.assert_close(doubled(x), doubled.base(x) + adapter, **close)
    plain.base.register_forward_hook(lambda module, args, output: output + 100)
    torch.testing.assert_close(plain(x) - 100, doubled(x) - doubled.base(x) / 2, rtol=0, atol=200 * EPS)


@pytest.mark.parametrize("opaque", [False, True])
def test_training_moves_the_factors_and_leaves_the_base(opaque: bool) -> None:
    base = (DoubledLinear if opaque else nn.Linear)(7, 5)
    layer = StellaLinear(base, r=3, dropout=0.2)
    assert sorted(n for n, p in layer.named_parameters() if p.requires_grad) == ["S", "U", "Vt"]
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(6, 7)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"U", "S", "Vt"}


def test_dropout_only_while_training() -> None:
    layer = StellaLinear(nn.Linear(30, 20), r=4, dropout=0.5)
    x = torch.randn(5, 30)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_are_float32_masters(dtype: torch.dtype) -> None:
    layer = StellaLinear(nn.Linear(12, 8, dtype=dtype), r=2)
    assert {layer.U.dtype, layer.S.dtype, layer.Vt.dtype} == {torch.float32}
    y = layer(torch.randn(3, 12, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.U.grad is not None
    assert layer.U.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("alpha", "use_rslora", "scale"), [(None, False, 1.0), (8, False, 2.0), (8, True, 4.0), (None, True, 2.0)]
)
def test_scale(alpha: float | None, use_rslora: bool, scale: float) -> None:
    assert StellaLinear(nn.Linear(6, 6), r=4, alpha=alpha, use_rslora=use_rslora).scale == scale


@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weight(dtype: torch.dtype, diag_s: bool) -> None:
    layer = StellaLinear(nn.Linear(40, 30, dtype=dtype), r=6, alpha=9, diag_s=diag_s, dropout=0.3)
    with torch.no_grad():
        layer.S.add_(torch.randn_like(layer.S))
    before = layer.base.weight.clone()
    merged = layer.merged_weight()
    assert merged.dtype == dtype
    assert torch.equal(layer.base.weight, before)
    wanted = dense(layer, torch.eye(40)).mT - layer.base.bias.detach().double()[:, None]
    # two products of at most 6 terms in float32, then the store
    bound = (2 * 6**1.5 * EPS + torch.finfo(dtype).eps / 2) * 2
    assert (merged.double() - wanted).norm() <= bound * wanted.norm()


def test_merging_needs_a_floating_point_weight() -> None:
    layer = StellaLinear(nn.Linear(6, 5), r=2)
    layer.base = nn.Identity()
    with pytest.raises(TypeError, match="base: Identity has no floating-point weight"):
        layer.merged_weight()


@pytest.mark.parametrize("diag_s", [False, True])
def test_state_dict_round_trip(diag_s: bool) -> None:
    first = StellaLinear(nn.Linear(9, 7), r=3, diag_s=diag_s)
    second = StellaLinear(nn.Linear(9, 7), r=3, diag_s=diag_s)
    assert set(first.state_dict()) == {"U", "S", "Vt", "base.weight", "base.bias"}
    x = torch.randn(4, 9)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_module_compiles_whole() -> None:
    torch._dynamo.reset()
    layer = StellaLinear(nn.Linear(9, 7), r=3, dropout=0.3)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 9)
    results = []
    for call in (layer, run):
        layer.zero_grad()
        torch.manual_seed(3)
        y = call(x)
        y.square().sum().backward()
        assert layer.U.grad is not None
        results.append((y.detach(), layer.U.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        # the same operators; only the loss around them may be summed in another order
        assert (eager - compiled).norm() <= 30 * EPS * eager.norm()


def test_repr_and_deepcopy() -> None:
    layer = StellaLinear(nn.Linear(9, 7), r=3, alpha=6, dropout=0.1)
    assert "in_features=9, out_features=7, r=3, alpha=6, scale=2, dropout=0.1, diag_s=False" in repr(layer)
    twin = copy.deepcopy(layer).eval()
    x = torch.randn(2, 9)
    assert torch.equal(twin(x), layer.eval()(x))
    assert twin.U is not layer.U


class Returning(nn.Module):
    """A base of 6 features that returns what ``function`` makes of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.in_features = self.out_features = 6
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("init", ["rando", "pseudo_zero"])
@pytest.mark.parametrize("function", [lambda x: x, torch.tanh, lambda x: x.new_ones(1, 1).expand(x.shape)])
def test_what_an_opaque_base_returns_is_not_overwritten(function: Callable[[Tensor], Tensor], init: str) -> None:
    """It may be the caller's x, what the base's backward needs, or memory that its elements share."""
    layer = StellaLinear(Returning(function), r=2, init=init, dtype=torch.float64)
    with torch.no_grad():
        layer.S.copy_(torch.randn(2, 2))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    start = 0 if layer.U0 is None else layer.U0 @ layer.Vt0
    wanted = function(x) + x @ (layer.U @ layer.S @ layer.Vt - start).mT
    found = layer(x)
    inputs = (x, layer.U, layer.S, layer.Vt)
    for f, w in zip(
        (found, *torch.autograd.grad(found.square().sum(), inputs)),
        (wanted, *torch.autograd.grad(wanted.square().sum(), inputs)),
        strict=True,
    ):
        assert (f - w).norm() <= 1e-13 * w.norm()  # sums of at most 6 terms: some hundred roundings
    assert torch.equal(x, before)


def test_hooks_on_the_base_keep_what_they_saw() -> None:
    base = nn.Linear(7, 5)
    seen: list[Tensor] = []
    base.register_forward_hook(lambda module, args, output: seen.append(output))
    base.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    x = torch.randn(3, 7, requires_grad=True)
    StellaLinear(base, r=2)(x).sum().backward()
    assert torch.equal(seen[0], nn.functional.linear(x, base.weight, base.bias))
    assert torch.equal(seen[1], torch.ones(3, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": nn.Conv1d(3, 3, 1)}, TypeError, "base: found Conv1d"),
        ({"base": "linear"}, TypeError, "base: found str"),
        ({"r": 6}, ValueError, "r: found 6, wanted 1 <= r <= 5"),
        ({"r": 0}, ValueError, "r: found 0"),
        ({"r": 2.0}, TypeError, "r: found 2.0, wanted a whole number"),
        ({"r": True}, TypeError, "r: found True"),
        ({"r": "2"}, TypeError, "r: found '2'"),
        ({"alpha": "big"}, TypeError, "alpha: found 'big'"),
        ({"alpha": math.nan}, ValueError, "alpha: found nan"),
        ({"dropout": 1.2}, ValueError, "dropout: found 1.2"),
        ({"dropout": "half"}, TypeError, "dropout: found 'half'"),
        ({"dtype": torch.int32}, TypeError, "dtype: found torch.int32"),
        ({"init": "zeros"}, ValueError, "init: found 'zeros'"),
    ],
)
def test_bad_arguments_leave_the_base_trainable(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    base = nn.Linear(7, 5)
    with pytest.raises(error, match=message):
        StellaLinear(**{"base": base, "r": 2, **arguments})  # type: ignore[arg-type]
    assert base.weight.requires_grad


# How an optimizer finds them


def test_stiefel_factors_of_a_model() -> None:
    model = nn.Sequential(
        StellaLinear(nn.Linear(7, 5), r=2), nn.ReLU(), nn.Sequential(StellaLinear(nn.Linear(5, 5), r=5))
    )
    factors = stiefel_factors(model)
    named = dict(model.named_parameters())
    assert [f.name for f in factors] == ["0.U", "0.Vt", "2.0.U", "2.0.Vt"]
    for factor in factors:
        assert factor.parameter is named[factor.name]
        assert factor.transposed == factor.name.endswith("Vt")  # square ones too
        view = factor.view
        assert view.shape[0] >= view.shape[1]
        assert not view.requires_grad
        assert view.untyped_storage().data_ptr() == factor.parameter.untyped_storage().data_ptr()
        torch.testing.assert_close(view.mT @ view, torch.eye(view.shape[1]), rtol=0, atol=50 * EPS)
    assert [f.name for f in stiefel_factors(model[0])] == ["U", "Vt"]


def test_frozen_factors_are_left_out_and_shared_ones_listed_once() -> None:
    first, second = (StellaLinear(nn.Linear(6, 6), r=2) for _ in range(2))
    first.U.requires_grad_(False)
    second.Vt = first.Vt
    assert [f.name for f in stiefel_factors(nn.Sequential(first, second))] == ["0.Vt", "1.U"]


def test_any_module_can_take_part() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frame = nn.Parameter(torch.eye(4, 2))

        def own_stiefel_factors(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
            yield "frame", self.frame, False

    assert [f.name for f in stiefel_factors(nn.ModuleDict({"a": Own()}))] == ["a.frame"]
    assert stiefel_factors(nn.Linear(3, 3)) == []
    by_hand = nn.Module()
    by_hand.own_stiefel_factors = Own().own_stiefel_factors
    assert [f.name for f in stiefel_factors(by_hand)] == ["frame"]


def test_a_wrapper_that_passes_attributes_on_owns_no_factor() -> None:
    compiled = torch.compile(StellaLinear(nn.Linear(6, 6), r=2))  # its __getattr__ asks the layer
    model = nn.Sequential(compiled)
    names = {name for name, _ in model.named_parameters()}
    assert [f.name for f in stiefel_factors(model)] == ["0._orig_mod.U", "0._orig_mod.Vt"]
    assert names >= {f.name for f in stiefel_factors(model)}


def test_a_list_is_no_model() -> None:
    with pytest.raises(TypeError, match="model: found list"):
        stiefel_factors([nn.Linear(3, 3)])  # type: ignore[arg-type]


# The package's face


def test_public_names() -> None:
    for name in (
        "polar",
        "stella_linear",
        "stella_adapter",
        "StellaLinear",
        "optim",
        "functional",
        "nn",
        "__version__",
    ):
        assert name in sk.__all__
        assert hasattr(sk, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sk.nothing  # noqa: B018


def test_import_leaves_peft_alone() -> None:
    code = "import sys, stella_kernels; sys.exit(any(m.split('.')[0] in ('peft', 'transformers') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=False).returncode == 0

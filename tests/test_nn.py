"""StellaLinear, the starts of the factors, and how an optimizer finds them."""

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
from stella_kernels.nn import INITS, StellaLinear, init_factors, stiefel_factors

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


class DoubledLinear(nn.Linear):
    """A base that is not a plain matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


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


# How the factors start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("m", "n", "r"), [(40, 24, 5), (24, 40, 24), (7, 7, 1)])
def test_start_is_orthonormal_with_identity_or_zero_core(m: int, n: int, r: int, init: str, dtype: torch.dtype) -> None:
    U, S, Vt = (torch.full(shape, torch.nan, dtype=dtype) for shape in ((m, r), (r, r), (r, n)))
    init_factors(U, S, Vt, init, torch.randn(m, n))
    start = 0 if init == "zero" else 1
    assert torch.equal(S, start * torch.eye(r, dtype=dtype))
    diagonal = torch.full((r,), torch.nan)
    init_factors(U, diagonal, Vt, init, torch.randn(m, n))
    assert torch.equal(diagonal, start * torch.ones(r))
    # Householder QR and the SVD are orthonormal to a small multiple of sqrt(length) eps a column, in float32 unless the
    # factor is float64 (the weight here is float32); the store rounds each entry by eps / 2, twice in QᵀQ
    arithmetic = torch.float64 if dtype == torch.float64 and init in ("rando", "identity") else torch.float32
    bound = 10 * max(m, n) ** 0.5 * r * torch.finfo(arithmetic).eps + 2 * r**0.5 * torch.finfo(dtype).eps / 2
    for Q in (U.double(), Vt.mT.double()):
        assert (Q.mT @ Q - torch.eye(r, dtype=torch.float64)).norm() <= bound


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("init", ["svd_major", "svd_minor"])
def test_svd_starts_pick_their_singular_vectors(init: str, fan_in_fan_out: bool) -> None:
    m, n, r = 12, 9, 3
    left, right = (torch.linalg.qr(torch.randn(k, 9, dtype=torch.float64))[0] for k in (m, n))
    values = torch.arange(9, 0, -1, dtype=torch.float64)
    weight = (left * values) @ right.mT
    chosen = slice(0, r) if init == "svd_major" else slice(9 - r, 9)
    U, S, Vt = torch.empty(m, r), torch.empty(r, r), torch.empty(r, n)
    stored = (weight.mT if fan_in_fan_out else weight).float()
    before = stored.clone()
    init_factors(U, S, Vt, init, stored, fan_in_fan_out)
    # U Vᵀ does not depend on the vectors' signs; they turn by at most the error of W, 9 * 12 eps, over the gap, 1
    wanted = left[:, chosen] @ right[:, chosen].mT
    assert ((U @ Vt).double() - wanted).norm() <= 9 * 12 * EPS * r
    assert torch.equal(stored, before)


def test_rando_is_uniform_and_seeded() -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        U, Vt = torch.empty(6, 2), torch.empty(2, 5)
        init_factors(U, torch.empty(2), Vt)
        starts.append(U)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    count = 2000
    corner = torch.empty(count)
    for i in range(count):
        U = torch.empty(3, 2)
        init_factors(U, torch.empty(2), torch.empty(2, 3))
        corner[i] = U[0, 0]
    # an entry of a uniform unit vector in three dimensions is uniform on [-1, 1]: mean 0, variance 1/3; bare QR gives
    # the corner one sign only. Six standard deviations.
    assert abs(float(corner.mean())) <= 6 * math.sqrt(1 / 3 / count)
    assert abs(float(corner.square().mean()) - 1 / 3) <= 6 * math.sqrt(4 / 45 / count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "normal"}, "init: found 'normal'"),
        ({"init": "svd_major"}, "base_weight: found None"),
        ({"init": "svd_major", "base_weight": torch.zeros(6, 5, dtype=torch.int8)}, "base_weight: found dtype"),
        ({"init": "svd_minor", "base_weight": torch.full((6, 5), math.nan)}, "base_weight: found NaN"),
        ({"init": "svd_minor", "base_weight": torch.zeros(5, 6)}, r"base_weight: found shape \(5, 6\)"),
        ({"Vt": torch.zeros(3, 5)}, "U, Vt: found shapes"),
        ({"S": torch.zeros(3)}, r"S: found shape \(3,\)"),
    ],
)
def test_bad_start_changes_nothing(change: dict[str, object], message: str) -> None:
    arguments = {"U": torch.zeros(6, 2), "S": torch.zeros(2), "Vt": torch.zeros(2, 5), **change}
    with pytest.raises(ValueError, match=message):
        init_factors(**arguments)  # type: ignore[arg-type]
    for name in ("U", "S", "Vt"):
        assert not arguments[name].any()  # type: ignore[attr-defined]


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
    with pytest.raises(TypeError, match="model: found list"):
        stiefel_factors([Own()])  # type: ignore[arg-type]


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


# Starts that leave the base layer's output as it was


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("init", ["zero", "pseudo_zero"])
def test_zero_starts_give_the_output_of_the_base(init: str, diag_s: bool, opaque: bool) -> None:
    base = (DoubledLinear if opaque else nn.Linear)(12, 9)
    x = torch.randn(5, 12)
    wanted, weight = base(x).detach(), base.weight.detach().clone()
    layer = StellaLinear(base, r=4, alpha=12, diag_s=diag_s, init=init).eval()
    # s x V Uᵀ is added and taken away again: two products of norm 3 ‖x‖ at most, in float32
    bound = 0.0 if init == "zero" else 2 * 12 * EPS * 3 * float(x.norm())
    assert float((layer(x) - wanted).norm()) <= bound + 4 * EPS * float(wanted.norm())
    assert torch.equal(base.weight, weight)
    assert float((StellaLinear(nn.Linear(12, 9), r=4, alpha=12)(x) - layer(x)).norm()) > 0.1


@pytest.mark.parametrize("diag_s", [False, True])
def test_pseudo_zero_is_a_base_weight_without_the_first_adapter(diag_s: bool) -> None:
    """The paper's definition, W − s U₀ V₀ᵀ in the weight: the same output, gradients and merged weight, also later on.

    Dropout would show a start that is dropped too: the two layers draw the same mask from the same seed.
    """
    layer = StellaLinear(nn.Linear(12, 9).double(), r=4, alpha=12, dropout=0.4, diag_s=diag_s, init="pseudo_zero")
    layer = layer.double()
    assert sorted(n for n, p in layer.named_parameters() if p.requires_grad) == ["S", "U", "Vt"]
    literal = StellaLinear(copy.deepcopy(layer.base), r=4, alpha=12, dropout=0.4, diag_s=diag_s).double()
    with torch.no_grad():
        literal.base.weight -= layer.scale * layer.U @ layer.Vt
        for name in ("U", "S", "Vt"):  # training has gone on from the start
            getattr(layer, name).add_(0.1 * torch.randn_like(getattr(layer, name)))
            getattr(literal, name).copy_(getattr(layer, name))
    x = torch.randn(6, 12, dtype=torch.float64)
    results = []
    for module in (layer, literal):
        torch.manual_seed(5)
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append([y.detach(), inputs.grad, module.U.grad, module.S.grad, module.Vt.grad, module.merged_weight()])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        # float64 throughout, sizes of a few tens
        assert float((ours - theirs).norm()) <= 1e-12 * float(theirs.norm())


def test_pseudo_zero_is_saved_with_the_module() -> None:
    first, second = (StellaLinear(nn.Linear(9, 7), r=3, init="pseudo_zero") for _ in range(2))
    assert {"U0", "Vt0"} < set(first.state_dict())
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 9)
    assert torch.equal(first(x), second(x))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*U0"):  # not silently another function
        StellaLinear(nn.Linear(9, 7), r=3).load_state_dict(first.state_dict())

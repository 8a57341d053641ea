"""How the factors of a layer start, and starts that leave the base layer's output as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stella_kernels.nn import INITS, StellaLinear, init_factors
from tests.functional.adapter_layers import DoubledLinear
from tests.random_matrices import orthonormal

EPS = torch.finfo(torch.float32).eps

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
    left, right = (orthonormal(k, 9) for k in (m, n))
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


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["rando", "zero", "pseudo_zero", "svd_major", "identity"])
@pytest.mark.parametrize("saved", ["rando", "zero", "pseudo_zero", "svd_major", "identity"])
def test_what_is_loaded_decides_and_not_how_the_layer_started(saved: str, target: str, assign: bool) -> None:
    first, second = (StellaLinear(nn.Linear(9, 7), r=3, init=init) for init in (saved, target))
    with torch.no_grad():
        first.S.normal_()
    assert ({"U0", "Vt0"} < set(first.state_dict())) == (saved == "pseudo_zero")
    second.load_state_dict(copy.deepcopy(first.state_dict()), assign=assign)
    assert set(second.state_dict()) == set(first.state_dict())
    x = torch.randn(4, 9)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first.merged_weight(), second.merged_weight())


def test_a_state_dict_about_other_things_leaves_the_start() -> None:
    layer = StellaLinear(nn.Linear(9, 7), r=3, init="pseudo_zero")
    before = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({"base.bias": torch.zeros(7)}, strict=False)
    assert set(layer.state_dict()) == set(before)
    assert torch.equal(layer.state_dict()["U0"], before["U0"])


def test_half_a_start_is_refused_and_named() -> None:
    state = StellaLinear(nn.Linear(9, 7), r=3, init="pseudo_zero").state_dict()
    del state["Vt0"]
    with pytest.raises(RuntimeError, match="U0: found without its partner"):
        StellaLinear(nn.Linear(9, 7), r=3).load_state_dict(state)

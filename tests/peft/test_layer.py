"""The adapted layer: what it computes, merging, several adapters, bases of every orientation."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

pytest.importorskip("peft")

from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from stella_kernels.nn import stiefel_factors
from stella_kernels.peft import StellaConfig
from tests.peft.models import (
    SAME_LOGITS,
    Mlp,
    adapted,
    check_dropped_out_in_training_only,
    difference,
    gpt2,
    llama,
    logits,
    orthonormality,
    stella_layers,
    stir,
    tokens,
)

# float64 layers of at most 32 inputs: a few dozen roundings of 2.2e-16, with room
EXACT = 1e-13


def one_layer(base: nn.Module, **settings):
    """A model of the single layer ``base``, adapted, and the adapted layer."""
    model = adapted(nn.Sequential(base), **{"target_modules": ["0"], **settings})
    stir(model)
    return model, stella_layers(model)["base_model.model.0"]


def expected(layer, x, weight, bias, scale, adapter="default"):
    """W x + b + s U S Vᵀ x, written out; ``weight`` is (m, n)."""
    U, S, Vt = (w.detach().double() for w in layer.factors(adapter))
    S = torch.diag(S) if S.dim() == 1 else S
    return x @ (weight + scale * U @ S @ Vt).mT + (0 if bias is None else bias)


@pytest.mark.parametrize(
    ("n", "m", "r"), [(8, 24, 3), (24, 8, 8), (6, 6, 6), (4, 9, 4), (9, 4, 4), (5, 7, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_shapes_also_where_factors_are_square(n, m, r, diagonal, rslora):
    base = nn.Linear(n, m, dtype=torch.float64)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    model, layer = one_layer(base, r=r, lora_alpha=5, stella_diag_s=diagonal, use_rslora=rslora)
    U, S, Vt = layer.factors("default")
    assert (U.shape, S.shape, Vt.shape) == ((m, r), (r,) if diagonal else (r, r), (r, n))
    x = torch.randn(2, 3, n, dtype=torch.float64)
    wanted = expected(layer, x, weight, bias, 5 / (math.sqrt(r) if rslora else r))
    assert difference(model(x).detach(), wanted) < EXACT
    assert [(f.transposed, f.view.shape) for f in stiefel_factors(model)] == [(False, (m, r)), (True, (n, r))]
    assert orthonormality(model) < EXACT * r  # each of r² entries of the Gram is exact to EXACT


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_conv1d_is_recognised_whatever_the_configuration_says(fan_in_fan_out):
    base = Conv1D(12, 8).double()  # 8 to 12, weight stored (8, 12)
    with torch.no_grad():
        base.bias.normal_()
    weight, bias = base.weight.detach().mT.clone(), base.bias.detach().clone()
    model, layer = one_layer(base, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(5, 8, dtype=torch.float64)
    wanted = expected(layer, x, weight, bias, 2.0)
    assert difference(model(x).detach(), wanted) < EXACT
    model.merge_adapter()
    assert layer.base_layer.weight.shape == (8, 12)
    assert difference(model(x).detach(), wanted) < EXACT


class StoredTransposed(nn.Module):
    """A linear layer of a type nobody knows, its weight stored (n, m)."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n, m
        self.weight = nn.Parameter(torch.randn(n, m, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight


def test_fan_in_fan_out_of_an_unknown_layer_type():
    base = StoredTransposed(8, 5)
    weight = base.weight.detach().mT.clone()
    model, layer = one_layer(base, fan_in_fan_out=True)
    x = torch.randn(4, 8, dtype=torch.float64)
    wanted = expected(layer, x, weight, None, 2.0)
    assert difference(model(x).detach(), wanted) < EXACT
    model.merge_adapter(safe_merge=True)
    assert difference(model(x).detach(), wanted) < EXACT


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("init", ["svd_major", "svd_minor"])
def test_svd_inits_take_singular_vectors_of_the_weight(conv, init):
    base = Conv1D(12, 8).double() if conv else nn.Linear(8, 12, dtype=torch.float64)
    nn.init.normal_(base.weight)
    weight = (base.weight.mT if conv else base.weight).detach().clone()
    model = adapted(nn.Sequential(base), target_modules=["0"], r=3, init_lora_weights=init)
    U, S, Vt = stella_layers(model)["base_model.model.0"].factors("default")
    values = torch.linalg.svdvals(weight)
    chosen = values[:3] if init == "svd_major" else values[-3:]
    # UᵀWV = Σ of the chosen values: true of the singular vectors, in the same order and with consistent signs, only
    assert torch.allclose(U.detach().mT @ weight @ Vt.detach().mT, torch.diag(chosen), atol=1e-12)
    assert torch.equal(S.detach(), torch.eye(3, dtype=torch.float64))


def test_init_true_is_random_and_orthonormal_and_false_is_the_identity():
    models = [adapted(Mlp(), target_modules=["up"], init_lora_weights=init) for init in (True, "rando", False)]
    U = [stella_layers(m)["base_model.model.up"].factors("default")[0].detach() for m in models]
    assert not torch.equal(U[0], U[1])
    assert torch.equal(U[2], torch.eye(24, 4, dtype=torch.float64))
    assert all(orthonormality(model) < EXACT for model in models)


def test_several_active_adapters_are_computed_together():
    base = Mlp()
    model = get_peft_model(base, StellaConfig(r=4, target_modules=["up", "down"])).eval()
    model.add_adapter("second", StellaConfig(r=2, lora_alpha=6, target_modules=["up"], stella_diag_s=True))
    for name in ("default", "second"):
        stir(model, name)
    layers = stella_layers(model)
    up, down = layers["base_model.model.up"], layers["base_model.model.down"]
    x = torch.randn(5, 8, dtype=torch.float64)
    wanted = expected(up, x, up.base_layer.weight, up.base_layer.bias, 2.0)
    alone = up(x).detach()
    assert difference(alone, wanted.detach()) < EXACT
    model.base_model.set_adapter(["default", "second"])
    U, S, Vt = (w.detach() for w in up.factors("second"))
    wanted = wanted + 3.0 * x @ (U @ torch.diag(S) @ Vt).mT
    assert difference(up(x).detach(), wanted.detach()) < EXACT
    names = {f.name for f in stiefel_factors(model)}
    assert len(names) == 6
    assert {name for name in names if "second" in name} == {
        "base_model.model.up.stella_U.second.weight",
        "base_model.model.up.stella_Vt.second.weight",
    }
    model.merge_adapter()
    assert up.merged_adapters == ["default", "second"]
    assert difference(up(x).detach(), wanted.detach()) < EXACT
    model.unmerge_adapter()
    assert down.merged_adapters == []
    model.set_adapter("second")
    assert difference(up(x).detach(), (wanted - alone + up.base_layer(x)).detach()) < 10 * EXACT
    assert {f.name for f in stiefel_factors(model)} == {name for name in names if "second" in name}


def test_merge_unmerge_and_unload():
    model = stir(adapted(llama(), r=3))
    ids = tokens()
    wanted = logits(model, ids)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "base_layer" in n)
    assert difference(logits(model, ids), wanted) < SAME_LOGITS
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            # two roundings at the size of the merged weight
            assert torch.allclose(
                parameter, before[name], rtol=0, atol=4 * 1.2e-7 * (1 + float(before[name].abs().max()))
            )
    assert difference(logits(model, ids), wanted) < SAME_LOGITS
    merged = model.merge_and_unload(safe_merge=True)
    assert not stella_layers(merged)
    assert difference(logits(merged, ids), wanted) < SAME_LOGITS


@pytest.mark.parametrize("safe_merge", [False, True])
def test_safe_merge_refuses_nan_and_changes_nothing(safe_merge):
    model, layer = one_layer(nn.Linear(8, 6, dtype=torch.float64))
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.stella_S["default"].weight[0, 0] = math.inf
    if not safe_merge:
        model.merge_adapter()
        assert not torch.equal(layer.base_layer.weight, before)
        return
    message = "^NaNs detected in the merged weights. The adapter default seems to be broken"  # as PEFT's LoRA says
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == []


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("factor", r"The adapter second seems to be broken: its factors in 'model\.layers\.1\.self_attn\.v_proj'"),
        ("base", r"The base weight of 'model\.layers\.1\.self_attn\.v_proj' holds NaN"),
        ("sum", r"The sum for 'model\.layers\.1\.self_attn\.v_proj' overflows torch\.float16"),
    ],
)
def test_safe_merge_names_what_is_broken(fault, message, unload):
    model = adapted(llama(dtype=torch.float16), target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", StellaConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    layer = list(stella_layers(model).values())[-1]
    with torch.no_grad():
        if fault == "factor":
            layer.stella_U["second"].weight[0] = math.nan
        elif fault == "base":
            layer.base_layer.weight[0] = math.nan
        else:
            layer.stella_S["second"].weight.fill_(1e6)
    with pytest.raises(ValueError, match=message):
        (model.merge_and_unload if unload else model.merge_adapter)(safe_merge=True)
    assert [layer.merged_adapters for layer in stella_layers(model).values()] == [[]] * 4


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("fault", ["nan", "quantized"])
def test_a_merge_that_fails_in_one_layer_changes_no_other(fault, unload):
    model = adapted(llama(), target_modules=["q_proj", "v_proj"])
    stir(model)
    layers = list(stella_layers(model).values())
    if fault == "nan":
        layers[-1].stella_S["default"].weight.data.fill_(math.nan)
    else:
        last = layers[-1].base_layer
        last.weight = nn.Parameter(torch.zeros(last.weight.shape, dtype=torch.uint8), requires_grad=False)
    before = [layer.base_layer.weight.clone() for layer in layers]
    with pytest.raises((ValueError, TypeError), match="merge"):
        (model.merge_and_unload if unload else model.merge_adapter)(safe_merge=fault == "nan")
    assert [layer.merged_adapters for layer in stella_layers(model).values()] == [[]] * len(layers)
    assert all(torch.equal(layer.base_layer.weight, w) for layer, w in zip(layers, before, strict=True))


def test_merging_into_a_quantized_weight_is_refused():
    model, layer = one_layer(nn.Linear(8, 6, dtype=torch.float64))
    layer.base_layer.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"merge: found a base weight of torch\.uint8"):
        model.merge_adapter()
    assert layer.merged_adapters == []


def test_disable_enable_and_disable_while_merged():
    model = stir(adapted(llama()))
    ids = tokens()
    with_adapter = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    assert difference(base, with_adapter) > 1e-2  # the adapter does something
    assert torch.equal(logits(model, ids), with_adapter)
    model.merge_adapter()
    with model.disable_adapter():
        assert difference(logits(model, ids), base) < SAME_LOGITS


def test_dropout_only_in_training_and_only_on_the_adapter():
    model, layer = one_layer(nn.Linear(64, 8, dtype=torch.float64), lora_dropout=0.5)
    x = torch.randn(16, 64, dtype=torch.float64)
    check_dropped_out_in_training_only(model, x)
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))


def test_a_hook_on_the_base_layer_keeps_the_output_it_saw():
    model, layer = one_layer(nn.Linear(8, 6, dtype=torch.float64))
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(4, 8, dtype=torch.float64)
    model(x)
    assert torch.equal(seen[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


class SavesItsOutput(nn.Module):
    """A base layer whose backward needs its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 6
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x @ self.weight.mT)


def test_a_base_layer_that_saves_its_output_still_differentiates():
    model, layer = one_layer(SavesItsOutput())
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    wanted = torch.tanh(x @ layer.base_layer.weight.mT) + x @ layer.get_delta_weight("default").mT
    (wanted_x,) = torch.autograd.grad(wanted.square().sum(), x)
    (found_x,) = torch.autograd.grad(model(x).square().sum(), x)
    assert difference(found_x, wanted_x) < EXACT


def test_gradients_of_all_factors():
    model, layer = one_layer(nn.Linear(8, 6, dtype=torch.float64), r=3)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    target = torch.randn(2, 4, 6, dtype=torch.float64)
    factors = layer.factors("default")
    found = torch.autograd.grad((model(x) - target).square().sum(), factors)
    U, S, Vt = factors
    y = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias) + 8 / 3 * x @ (U @ S @ Vt).mT
    wanted = torch.autograd.grad((y - target).square().sum(), factors)
    for a, b in zip(found, wanted, strict=True):
        assert difference(a, b) < 10 * EXACT


def test_scaling_methods():
    _, layer = one_layer(nn.Linear(8, 6, dtype=torch.float64), r=4, lora_alpha=10, use_rslora=True)
    assert layer.scaling["default"] == 5.0
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 15.0
    layer.unscale_layer(3.0)
    assert layer.scaling["default"] == 5.0
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 2.5
    layer.unscale_layer()
    assert layer.scaling["default"] == 5.0
    layer.set_scale("absent", 2.0)
    assert "absent" not in layer.scaling


def test_gpt2_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = stir(adapted(gpt2(), target_modules=["c_attn", "c_proj"]))
    ids = tokens()
    wanted = logits(model, ids)
    assert difference(logits(model.merge_and_unload(), ids), wanted) < SAME_LOGITS

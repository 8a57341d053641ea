"""Embeddings and convolutions with adapters against W + s U S Vᵀ written out: outputs, gradients, merging, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft.helpers import disable_input_dtype_casting
from torch import nn

from stella_kernels.nn import stiefel_factors
from stella_kernels.peft import Conv, Embedding, StellaConfig
from stella_kernels.peft.base_layer import layer_features
from tests.peft.layers.bases import BASES, EXACT, base_and_input, dense, one_layer, update
from tests.peft.models import check_dropped_out_in_training_only, difference, stir

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("start", "diagonal"), [("rando", False), ("svd_major", True), ("pseudo_zero", False), ("pseudo_zero", True)]
)
@pytest.mark.parametrize("name", BASES)
def test_outputs_and_gradients(name, diagonal, start):
    base, x = base_and_input(name)
    n, m = layer_features(base)
    model, layer = one_layer(
        copy.deepcopy(base), lora_alpha=5, use_rslora=True, stella_diag_s=diagonal, init_lora_weights=start
    )
    assert type(layer) is (Embedding if isinstance(base, nn.Embedding) else Conv)
    assert [tuple(f.shape) for f in layer.factors("default")] == [(m, 3), (3,) if diagonal else (3, 3), (3, n)]
    assert [(f.transposed, tuple(f.view.shape)) for f in stiefel_factors(model)] == [(False, (m, 3)), (True, (n, 3))]
    found, wanted = model(x), dense(base, x, update(layer))
    assert difference(found.detach(), wanted.detach()) < EXACT
    factors = layer.factors("default")
    target = torch.randn_like(wanted)
    ours = torch.autograd.grad((found - target).square().sum(), factors)
    theirs = torch.autograd.grad((wanted - target).square().sum(), factors)
    for one, other in zip(ours, theirs, strict=True):
        # sums over the positions too, up to 96, whose terms add up to no more than sqrt(96) < 10 times the sum
        assert difference(one, other) < 10 * EXACT


@pytest.mark.parametrize("name", [name for name in BASES if "embedding" not in name])
def test_gradient_of_the_input(name):
    base, x = base_and_input(name)
    model, layer = one_layer(copy.deepcopy(base))
    x.requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(dense(base, x, update(layer)).square().sum(), x)
    assert difference(found, wanted) < 10 * EXACT


@pytest.mark.parametrize("start", ["svd_major", "svd_minor"])
@pytest.mark.parametrize("name", ["embedding", "2d"])
def test_svd_starts_take_singular_vectors_of_the_weight(name, start):
    base, _ = base_and_input(name)
    matrix = base.weight.detach().mT if name == "embedding" else base.weight.detach().flatten(1)
    _, layer = one_layer(base, init_lora_weights=start)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    chosen = slice(0, 3) if start == "svd_major" else slice(-3, None)
    U, _, Vt = layer.factors("default")
    # singular vectors are known but for their sign; they are orthonormal to a few eps
    assert difference((left[:, chosen].mT @ U).detach().abs(), torch.eye(3)) < EXACT
    assert difference((right[chosen] @ Vt.mT).detach().abs(), torch.eye(3)) < EXACT


@pytest.mark.parametrize("start", ["rando", "pseudo_zero"])
@pytest.mark.parametrize("name", BASES)
def test_merging_unmerging_disabling_and_unloading(name, start):
    base, x = base_and_input(name)
    model, layer = one_layer(copy.deepcopy(base), init_lora_weights=start)
    plain, wanted = base(x).detach(), model(x).detach()
    assert difference(wanted, plain) > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight.shape == base.weight.shape
    assert difference(layer.base_layer(x).detach(), wanted) < EXACT
    assert difference(model(x).detach(), wanted) < EXACT
    model.unmerge_adapter()
    assert difference(layer.base_layer(x).detach(), plain) < EXACT
    assert difference(model(x).detach(), wanted) < EXACT
    unloaded = model.merge_and_unload()
    assert type(unloaded[0]) is type(base)
    assert difference(unloaded(x).detach(), wanted) < EXACT


@pytest.mark.parametrize("name", ["embedding, padding", "1d", "2d", "3d"])
def test_several_adapters_active_apart_deleted_and_by_row(name):
    base, x = base_and_input(name)
    model, layer = one_layer(copy.deepcopy(base))
    model.add_adapter("second", StellaConfig(r=2, target_modules=["0"], stella_diag_s=True, lora_alpha=3))
    stir(model, "second")
    alone = {"__base__": base(x).detach()}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        alone[adapter] = dense(base, x, update(layer, adapter)).detach()
        assert difference(model(x).detach(), alone[adapter]) < EXACT
    names = ["second", "__base__", "default"][: len(x)]
    rows = torch.stack([alone[adapter][i] for i, adapter in enumerate(names)])
    assert difference(model(x, adapter_names=names).detach(), rows) < EXACT
    model.base_model.set_adapter(["default", "second"])
    both = dense(base, x, update(layer), update(layer, "second")).detach()
    assert difference(model(x).detach(), both) < EXACT
    model.merge_adapter(["second"])
    assert difference(layer.base_layer(x).detach(), alone["second"]) < EXACT
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("second")
    assert list(layer.r) == ["default"]
    assert difference(model(x).detach(), alone["default"]) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["embedding", "embedding, scaled by a tensor", "1d, stride", "2d", "3d"])
def test_half_precision_models_compute_in_their_dtype_beside_float32_masters(name, dtype):
    base, x = base_and_input(name, dtype)
    model, layer = one_layer(copy.deepcopy(base))
    assert {factor.dtype for factor in layer.factors("default")} == {torch.float32}
    found = model(x)
    assert found.dtype == dtype
    in_double = copy.deepcopy(base).double(), x if x.dtype == torch.int64 else x.double()
    wanted = dense(*in_double, update(layer).double())
    # of the factors, of two products, of three sums and of the scale: less than 16 roundings of eps / 2, each of up to
    # sqrt(27) times the largest sum
    assert difference(found.detach(), wanted.detach()) < 16 * 3 * torch.finfo(dtype).eps
    found.float().square().sum().backward()
    assert {factor.grad.dtype for factor in layer.factors("default")} == {torch.float32}
    with disable_input_dtype_casting(model):  # a switch of PEFT's; the masters are never what an input is cast to
        assert torch.equal(model(x), found)
    merged = model.merge_and_unload()(x)
    assert merged.dtype == dtype
    assert difference(merged.detach(), wanted.detach()) < 16 * 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["embedding", "1d", "2d"])
def test_autocast_computes_in_the_dtype_of_the_base(name):
    base, x = base_and_input(name, torch.float32)
    model, layer = one_layer(copy.deepcopy(base))
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = base(x), model(x)
    assert found.dtype == plain.dtype == (torch.float32 if name == "embedding" else torch.bfloat16)
    if name == "embedding":  # a look-up is not autocast, and neither is the adapter's product then
        assert torch.equal(found, exact)
    assert difference(found.detach(), exact.detach()) < 16 * 3 * torch.finfo(torch.bfloat16).eps
    found.float().square().sum().backward()
    assert {factor.grad.dtype for factor in layer.factors("default")} == {torch.float32}


@pytest.mark.parametrize("name", ["1d", "2d"])
def test_dropout_of_a_convolution_is_the_inputs_and_only_in_training(name):
    base, x = base_and_input(name)
    model, _ = one_layer(base, lora_dropout=0.5)
    check_dropped_out_in_training_only(model, x)


def test_ids_cannot_be_dropped_out():
    base, x = base_and_input("embedding")
    model, _ = one_layer(base, lora_dropout=0.5)
    assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["embedding, padding", "1d, circular", "2d"])
def test_compiles_as_one_graph(name):
    base, x = base_and_input(name, torch.float32)
    model, layer = one_layer(base)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(x).square().sum()
    found = torch.autograd.grad(loss, layer.factors("default"))
    wanted = torch.autograd.grad(model(x).square().sum(), layer.factors("default"))
    for one, other in zip(found, wanted, strict=True):
        # the same operations in another order: EXACT in the other dtype
        assert difference(one, other) < 10 * EXACT * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps

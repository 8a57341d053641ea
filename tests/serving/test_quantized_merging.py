"""Merging into quantized bases as PEFT's LoRA does, and failures half-way that leave the model as it was."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("peft.utils.quantization_utils", reason="this PEFT cannot write quantized weights")

from peft import LoraConfig, get_peft_model
from torch import nn

from stella_kernels.peft.layers.linear import Linear
from tests.peft.models import adapted, difference, stella_layers, stir

WIDTH = 64


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def bnb(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = Two()
    for name in ("first", "second"):
        linear = getattr(net, name)
        if kind == "bnb 4bit":
            layer = bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, quant_type="nf4", compute_dtype=torch.float32)
        else:
            layer = bitsandbytes.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
        layer.load_state_dict(linear.state_dict())
        setattr(net, name, layer.to("cpu"))
    return net


def torchao(config=None, only=("first", "second")):
    quantization = pytest.importorskip("torchao.quantization")
    net, config = Two(), config or quantization.Int8WeightOnlyConfig()
    quantization.quantize_(net, config, filter_fn=lambda module, name: name in only)
    # where PEFT looks for the way to quantize again
    net.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: config))
    return net


def built(kind):
    torch.manual_seed(0)
    net = torchao() if kind == "torchao" else bnb(kind)
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        net(x)  # bitsandbytes quantizes at the latest now
    return net, x


# What the codes leave of a weight, relative: 8 bits by row 1 / 254, nf4 about 1 / 10; of the sum the same again.
ROUNDING = {"bnb 8bit": 0.03, "bnb 4bit": 0.3, "torchao": 0.03}


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("kind", ["bnb 8bit", "bnb 4bit", "torchao"])
def test_merging_quantizes_the_sum_as_lora_does(kind, unload):
    net, x = built(kind)
    model = stir(adapted(net, target_modules=["first", "second"], lora_alpha=2))
    with torch.no_grad():
        base, wanted = base_output(model, x), model(x)
        with pytest.warns(UserWarning, match=rf"quantized again .{kind}"):
            merged = (model.merge_and_unload if unload else model.merge_adapter)() or model
        found = merged(x)
    assert difference(found, wanted) < ROUNDING[kind]
    assert difference(base, wanted) > 2 * difference(found, wanted)
    if unload:
        assert not any(isinstance(module, Linear) for module in merged.modules())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.unmerge_adapter()
    with torch.no_grad():
        assert difference(model(x), wanted) < ROUNDING[kind]


def base_output(model, x):
    with model.disable_adapter():
        return model(x)


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("kind", ["bnb 8bit", "bnb 4bit", "torchao"])
def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch, kind, unload):
    net, x = built(kind)
    model = stir(adapted(net, target_modules=["first", "second"], lora_alpha=2))
    layers = stella_layers(model)
    with torch.no_grad():
        wanted, base = model(x), base_output(model, x)
    last = list(layers.values())[-1]
    backend = copy.copy(last.quantization_backend)

    def fail(layer, weight):
        raise MemoryError("no room for the new weight")

    monkeypatch.setattr(backend, "set_base_weight", fail)
    last.quantization_backend = backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MemoryError, match="no room"):
            (model.merge_and_unload if unload else model.merge_adapter)()
    assert stella_layers(model).keys() == layers.keys()
    assert not any(layer.merged for layer in layers.values())
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
        assert torch.equal(base_output(model, x), base)


@pytest.mark.parametrize("unload", [False, True])
def test_a_torchao_weight_without_a_way_to_quantize_again_is_refused_first(unload):
    net = torchao(only=("second",))  # the first layer is not quantized
    del net.hf_quantizer
    model = stir(adapted(net, target_modules=["first", "second"]))
    before = model.base_model.model.first.base_layer.weight.clone()
    with pytest.raises(TypeError, match=r"merge: found a base weight of \w+Tensor, .*without quantization"):
        (model.merge_and_unload if unload else model.merge_adapter)()
    assert torch.equal(before, model.base_model.model.first.base_layer.weight)
    assert not any(layer.merged for layer in stella_layers(model).values())
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):  # as LoRA is
        get_peft_model(copy.deepcopy(net), LoraConfig(target_modules=["second"])).merge_adapter()


def test_a_plain_layer_is_unmerged_where_a_later_one_fails(monkeypatch):
    model = stir(adapted(Two(), target_modules=["first", "second"]))
    before = {name: layer.base_layer.weight.clone() for name, layer in stella_layers(model).items()}
    last = list(stella_layers(model).values())[-1]

    def fail(weight):
        raise MemoryError("no room for the sum")

    monkeypatch.setattr(last, "_set_base_weight", fail)
    with pytest.raises(MemoryError):
        model.merge_and_unload()
    for name, layer in stella_layers(model).items():
        assert not layer.merged
        # added and subtracted again: some roundings of float32
        assert difference(layer.base_layer.weight, before[name]) < 8 * torch.finfo(torch.float32).eps

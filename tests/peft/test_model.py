"""The tuner: which layers it adapts and trains, dtypes, mixed batches, errors that leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from stella_kernels.nn import stiefel_factors
from stella_kernels.peft import StellaConfig, StellaModel
from tests.peft.models import (
    SAME_LOGITS,
    Mlp,
    adapted,
    difference,
    gpt2,
    llama,
    logits,
    orthonormality,
    stella_layers,
    stir,
    tokens,
)

saves_biases = pytest.mark.skipif(
    not hasattr(BaseTuner, "_get_learnable_bias_state_dict"), reason="this PEFT does not save biases of new methods"
)


def adapted_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in stella_layers(model)}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_all_linear_takes_every_linear_layer_but_the_output():
    linear = {name for name, module in llama().named_modules() if isinstance(module, nn.Linear)}
    model = adapted(llama())
    assert adapted_names(model) == linear - {"lm_head"}
    assert all("stella_" in name for name in trained_names(model))
    assert len(trained_names(model)) == 3 * len(adapted_names(model))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_default_targets_are_those_of_lora(make):
    lora = get_peft_model(make(), LoraConfig())
    model = get_peft_model(make(), StellaConfig())
    assert model.peft_config["default"].target_modules == lora.peft_config["default"].target_modules
    assert adapted_names(model)


def test_layers_to_transform_exclude_and_patterns():
    model = adapted(
        llama(layers=3),
        target_modules=["q_proj", "k_proj", "up_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        r=6,
        lora_alpha=12,
        rank_pattern={"up_proj": 3, r"layers\.2\.self_attn\.q_proj": 2},
        alpha_pattern={"q_proj": 30},
    )
    found = {name.removeprefix("base_model.model."): layer for name, layer in stella_layers(model).items()}
    settings = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in found.items()}
    assert settings == {
        "model.layers.0.self_attn.q_proj": (6, 5.0),
        "model.layers.0.mlp.up_proj": (3, 4.0),
        "model.layers.2.self_attn.q_proj": (2, 15.0),
        "model.layers.2.mlp.up_proj": (3, 4.0),
    }
    assert {n: layer.factors("default")[0].shape[1] for n, layer in found.items()} == {
        n: r for n, (r, _) in settings.items()
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # the first layer that matches is wide enough, a later one is not: k_proj has 16 outputs
        (
            {"target_modules": ["q_proj", "k_proj"], "r": 20},
            r"r: found 20 .*0\.self_attn\.k_proj.* 32 inputs and 16 out",
        ),
        ({"target_modules": "all-linear", "r": 20}, r"r: found 20 .*k_proj"),
        ({"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 40}}, r"r: found 40 .*up_proj"),
        ({"target_modules": ["q_proj", "norm"]}, r"target_modules: .*norm' is a LlamaRMSNorm, wanted a linear"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_named_and_no_other_replaced(settings, message):
    model = llama()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    trained = trained_names(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, StellaConfig(**settings))
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert trained_names(model) == trained


def test_a_second_adapter_that_does_not_fit_leaves_the_first_alone():
    model = stir(adapted(llama()))
    ids = tokens()
    before = logits(model, ids)
    with pytest.raises(ValueError, match="r: found 20"):
        model.add_adapter("second", StellaConfig(r=20, target_modules=["q_proj", "k_proj"]))
    assert set(model.peft_config) == {"default"}
    assert all(set(layer.r) == {"default"} for layer in stella_layers(model).values())
    assert torch.equal(logits(model, ids), before)


def test_add_set_and_delete_adapters():
    model = stir(adapted(llama(), target_modules=["q_proj"]))
    ids = tokens()
    first = logits(model, ids)
    model.add_adapter("second", StellaConfig(r=3, target_modules=["v_proj"]))
    stir(model, "second")
    assert torch.equal(logits(model, ids), first)  # added, not active
    assert not [name for name in trained_names(model) if "second" in name]
    model.set_adapter("second")
    second = logits(model, ids)
    assert difference(second, first) > 1e-3
    assert all(".second." in name for name in trained_names(model))
    assert all("v_proj" in factor.name for factor in stiefel_factors(model))
    model.delete_adapter("default")
    assert set(model.peft_config) == {"second"}
    assert not [name for name in model.state_dict() if ".default." in name]
    assert torch.equal(logits(model, ids), second)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_stay_float32_masters_beside_a_half_precision_model(dtype, autocast):
    model = get_peft_model(llama(dtype=dtype), StellaConfig(r=4), autocast_adapter_dtype=autocast)
    model.add_adapter("second", StellaConfig(r=2))
    for cast in (lambda m: m, lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.to(dtype)):
        model = cast(model)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if "stella_" in name else parameter.dtype), name
        assert model.get_input_embeddings().weight.dtype in (dtype, torch.float16)
        # float32: r² entries of the Gram, each a few roundings off. bfloat16 would be 4e-3 sqrt(r)
        assert orthonormality(model) < 1e-5
        assert orthonormality(model, "second") < 1e-5
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == dtype
    out.loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "default" in n]
    assert gradients
    assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)


def test_double_follows_the_model_and_moves_work():
    model = adapted(Mlp(), target_modules=["up", "down"])
    assert all(p.dtype == torch.float64 for p in model.parameters())
    model = model.float()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.is_meta for p in model.to("meta").parameters())


def test_bfloat16_model_merges_to_the_nearest_weight():
    model = stir(adapted(llama(dtype=torch.bfloat16), target_modules=["q_proj"]))
    layer = next(iter(stella_layers(model).values()))
    wanted = layer.base_layer.weight.float() + layer.get_delta_weight("default").detach()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, wanted.bfloat16())


@saves_biases
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias(bias, tmp_path):
    base = llama(attention_bias=True, mlp_bias=True)
    fresh = copy.deepcopy(base)
    model = adapted(base, target_modules=["q_proj"], bias=bias)
    trained = {name for name in trained_names(model) if name.endswith(".bias")}
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert trained == (biases if bias == "all" else {name for name in biases if "q_proj" in name})
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                assert "k_proj" in name or bool((parameter.grad != 0).any()), name  # keys' biases cancel in the softmax
                parameter.normal_()
    model.save_pretrained(tmp_path)
    assert difference(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids)) < SAME_LOGITS


def test_biases_that_this_peft_would_not_save_are_refused(monkeypatch):
    monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=False)
    with pytest.raises(ValueError, match="bias: found 'all', but the installed PEFT"):
        get_peft_model(llama(), StellaConfig(bias="all"))


def test_layer_replication_shares_base_weights_and_refuses_to_merge():
    model = stir(adapted(llama(layers=3), target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)]))
    layers = list(stella_layers(model).values())
    assert len(layers) == 4
    assert layers[1].base_layer.weight is layers[2].base_layer.weight
    assert not torch.equal(layers[1].factors("default")[0], layers[2].factors("default")[0])
    logits(model, tokens())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="merge: layers replicated"):
            merge()


def test_mixed_batches_give_each_row_its_adapter():
    model = stir(adapted(llama(), target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", StellaConfig(r=3, target_modules=["up_proj", "down_proj"]))
    stir(model, "second")
    ids = tokens(rows=4)
    wanted = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted[name] = logits(model, ids)
    with model.disable_adapter():
        wanted["__base__"] = logits(model, ids)
    names = ["second", "__base__", "default", "second"]
    rows = torch.stack([wanted[name][i] for i, name in enumerate(names)])
    assert difference(logits(model, ids, adapter_names=names), rows) < SAME_LOGITS
    assert difference(logits(model, ids), wanted["second"]) < SAME_LOGITS  # the hooks are gone
    with pytest.raises(ValueError, match=r"adapter_names: found \['absent'\]"):
        logits(model, ids, adapter_names=["absent"] * 4)
    with pytest.raises(ValueError, match="found 2 names for a batch of 4"):
        logits(model, ids, adapter_names=["second"] * 2)
    assert difference(logits(model, ids), wanted["second"]) < SAME_LOGITS  # also after an error
    with pytest.raises(ValueError, match=r"call model\.eval"):
        logits(model.train(), ids, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits(model, ids, adapter_names=names)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_a_mixed_batch(beams):
    model = stir(adapted(llama()))
    model.add_adapter("second", StellaConfig(r=3, target_modules=["up_proj"]))
    stir(model, "second")
    ids = tokens(rows=2)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    how["attention_mask"] = torch.ones_like(ids)
    alone = []
    for row, name in enumerate(("second", "default")):
        model.set_adapter(name)
        how_row = {**how, "attention_mask": how["attention_mask"][:1]}
        alone.append(model.generate(input_ids=ids[row : row + 1], **how_row)[0])
    mixed = model.generate(input_ids=ids, adapter_names=["second", "default"], **how)
    assert torch.equal(mixed, torch.stack(alone))


def test_the_stella_model_is_what_peft_makes():
    model = adapted(llama())
    assert type(model.base_model) is StellaModel
    trained, total = model.get_nb_trainable_parameters()
    assert trained == sum(w.numel() for layer in stella_layers(model).values() for w in layer.factors("default"))
    assert total == sum(p.numel() for p in model.parameters())
    assert not stella_layers(model.unload())


def test_compiles_as_one_graph():
    model = stir(adapted(Mlp(torch.float32), target_modules=["up", "down"]))
    x = torch.randn(5, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert difference(compiled(x).detach(), model(x).detach()) < SAME_LOGITS
    compiled(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    assert found
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert difference(found[name], parameter.grad) < SAME_LOGITS, name

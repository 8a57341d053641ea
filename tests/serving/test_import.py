"""A LoRA adapter as a StelLA adapter of the same rank: the same model, with orthonormal factors, and back again."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from stella_kernels.peft import attach_adapter, save_as_lora
from stella_kernels.serving import export_adapter, import_adapter
from tests.peft.models import (
    SAME_LOGITS,
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

# Householder QRs in float64 are orthonormal to 1e-15; storing each of the up to 48 r entries in float32 moves QᵀQ by at
# most 2 sqrt(r) eps
ORTHONORMAL = 8 * torch.finfo(torch.float32).eps


def lora(base, **settings):
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "k_proj", "up_proj"], **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 16},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 8, "up_proj": 2}, "alpha_pattern": {"k_proj": 3}},
        {"r": 40, "target_modules": ["k_proj", "q_proj", "down_proj"]},  # more than the layers can have
        {"r": 40, "use_rslora": True, "alpha_pattern": {"k_proj": 3}},
        {"target_modules": r".*\.layers\.1\..*(q_proj|down_proj)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_import_is_exact_and_on_the_manifold(tmp_path, settings, diagonal):
    base = llama(tie_word_embeddings=False)
    fresh = copy.deepcopy(base)
    model, ids = lora(base, **settings), tokens()
    model.save_pretrained(tmp_path / "lora")
    ranks = import_adapter(tmp_path / "lora", tmp_path / "stella", diagonal=diagonal)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "stella", is_trainable=True).eval()
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS
    assert orthonormality(loaded) < ORTHONORMAL
    layers = stella_layers(loaded)
    assert {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in layers.items()} == ranks
    for name, layer in layers.items():
        assert layer.factors("default")[1].dim() == (1 if diagonal else 2)
        there = model.get_submodule(name)
        assert layer.r["default"] == min(there.r["default"], layer.in_features, layer.out_features)
        wanted = there.get_delta_weight("default").double()
        assert float((layer.get_delta_weight("default") - wanted).norm() / wanted.norm()) < 1e-6


def test_a_lora_that_has_not_trained_is_imported_as_zero(tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    import_adapter(tmp_path / "lora", tmp_path / "stella")
    ids = tokens()
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "stella")
    assert torch.equal(logits(loaded, ids), logits(fresh, ids))
    assert orthonormality(loaded) < ORTHONORMAL


def test_conv1d(tmp_path):
    base = gpt2()
    fresh = copy.deepcopy(base)
    model, ids = lora(base, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True), tokens()
    model.save_pretrained(tmp_path / "lora")
    import_adapter(tmp_path / "lora", tmp_path / "stella")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "stella")
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS


@pytest.mark.parametrize("start", ["rando", "pseudo_zero"])
def test_import_of_an_export_trains_on_from_the_same_loss(tmp_path, start):
    base = llama()
    fresh = copy.deepcopy(base)
    model, ids = stir(adapted(base, lora_alpha=2, init_lora_weights=start)), tokens()
    save_as_lora(tmp_path / "lora", model)
    import_adapter(tmp_path / "lora", tmp_path / "stella")
    back = PeftModel.from_pretrained(fresh, tmp_path / "stella", is_trainable=True)
    losses = []
    optimizer = torch.optim.AdamW(back.parameters(), lr=1e-2, weight_decay=0.0)
    attach_adapter(optimizer, back)
    for _ in range(5):
        loss = back(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        before = float(model(input_ids=ids, labels=ids).loss)
    assert abs(losses[0] - before) < SAME_LOGITS * before
    assert losses[-1] < losses[0]
    assert orthonormality(back) < 1e-5
    back.save_pretrained(tmp_path / "again")
    export_adapter(tmp_path / "again", tmp_path / "lora again")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("target_parameters", ["experts.down_proj"]),
        ("lora_bias", True),
        ("a_field_of_the_future", True),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, field, value):
    lora(llama()).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"^{field}: found"):
        import_adapter(tmp_path / "lora", tmp_path / "stella")
    assert not (tmp_path / "stella").exists()


def test_lora_of_an_embedding_is_imported(tmp_path):
    lora(llama(), target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path / "lora")
    assert "model.embed_tokens" in import_adapter(tmp_path / "lora", tmp_path / "stella")


def test_a_matrix_without_its_partner_is_refused(tmp_path):
    lora(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "half")
    weights = tmp_path / "half" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: t for k, t in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in k}, weights)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: found .*wanted lora_A"):
        import_adapter(tmp_path / "half", tmp_path / "stella")

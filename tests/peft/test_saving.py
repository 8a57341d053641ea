"""Saving and loading adapters: PEFT's files, the published package's key names, half-precision checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("peft")

import peft
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from stella_kernels.peft import StellaConfig
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
from tests.random_matrices import orthonormal

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SHAPES = {"q_proj": (32, 32), "down_proj": (32, 48)}  # (m, n)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stella_diag_s": True, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"init_lora_weights": "svd_major", "target_modules": ["v_proj"]},
        {"layer_replication": [(0, 2), (0, 2)], "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["o_proj"]},
    ],
)
def test_save_and_load_give_the_same_logits(tmp_path, settings, low_cpu_mem_usage):
    if low_cpu_mem_usage and "layer_replication" in settings:
        pytest.skip("PEFT leaves the replicated base layers on the meta device, whatever the method")
    base = llama(tie_word_embeddings=False)
    fresh = copy.deepcopy(base)
    model = stir(adapted(base, **settings))
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.get_output_embeddings().weight.normal_(std=0.1)
        assert [n for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    ids = tokens()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in loaded.parameters())
    for name, layer in stella_layers(model).items():
        for wanted, found in zip(layer.factors("default"), stella_layers(loaded)[name].factors("default"), strict=True):
            assert torch.equal(found, wanted)
            assert found.dtype == torch.float32
            assert not found.requires_grad
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS
    trainable = PeftModel.from_pretrained(copy.deepcopy(llama()), tmp_path, is_trainable=True)
    assert all(w.requires_grad for layer in stella_layers(trainable).values() for w in layer.factors("default"))


def test_conv1d_saves_and_loads(tmp_path):
    base = gpt2()
    fresh = copy.deepcopy(base)
    model = stir(adapted(base, target_modules=["c_attn", "c_fc"]))
    model.save_pretrained(tmp_path)
    ids = tokens()
    assert difference(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids)) < SAME_LOGITS


def test_file_names_keys_and_shapes(tmp_path):
    adapted(llama(), target_modules=["q_proj", "down_proj"], r=4).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wanted = {}
    for layer in (0, 1):
        for name, (m, n) in (("self_attn.q_proj", (32, 32)), ("mlp.down_proj", (32, 48))):
            prefix = f"base_model.model.model.layers.{layer}.{name}.stella_"
            wanted.update({f"{prefix}U.weight": (m, 4), f"{prefix}S.weight": (4, 4), f"{prefix}Vt.weight": (4, n)})
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == wanted


def published_checkpoint(folder, r: int = 4, diagonal: bool = False, dtype: torch.dtype = torch.float32):
    """Write what the published package writes, by hand; return {layer: (U, S, Vᵀ)} in float64 as written."""
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "peft_type": "STELLA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "revision": None,
        "r": r,
        "target_modules": list(LAYERS),
        "exclude_modules": None,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "stella_retraction": "exp_map",
        "stella_diag_s": diagonal,
        "stella_grad_scaling": 4096.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": "svd_major",
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layer_replication": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors, factors = {}, {}
    for layer in LAYERS:
        m, n = SHAPES[layer.rpartition(".")[2]]
        U, S, Vt = orthonormal(m, r), torch.randn((r,) if diagonal else (r, r)), orthonormal(n, r).mT
        for name, factor in (("U", U), ("S", S), ("Vt", Vt)):
            tensors[f"base_model.model.{layer}.stella_{name}.weight"] = factor.to(dtype).contiguous()
        factors[layer] = tuple(
            tensors[f"base_model.model.{layer}.stella_{k}.weight"].double() for k in ("U", "S", "Vt")
        )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return factors


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("r", [4, 32])  # 32: U and V of q_proj, and U of down_proj, are square
def test_a_checkpoint_in_the_published_key_names_loads(tmp_path, r, diagonal):
    factors = published_checkpoint(tmp_path, r, diagonal)
    base = llama()
    by_hand = copy.deepcopy(base)
    for layer, (U, S, Vt) in factors.items():
        weight = by_hand.get_submodule(layer).weight
        S = torch.diag(S) if diagonal else S
        weight.data = (weight.double() + 16 / r * U @ S @ Vt).float()
    model = PeftModel.from_pretrained(base, tmp_path)
    config = model.peft_config["default"]
    assert (config.stella_retraction, config.stella_grad_scaling) == ("exp_map", 4096.0)
    ids = tokens()
    assert difference(logits(model, ids), logits(by_hand, ids)) < SAME_LOGITS


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_half_precision_checkpoint_comes_back_to_the_manifold(tmp_path, low_cpu_mem_usage):
    factors = published_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert orthonormality(model) < 1e-5  # float32; the file's own is about 4e-3
    for name, layer in stella_layers(model).items():
        stored = factors[name.removeprefix("base_model.model.")]
        for found, wanted in zip(layer.factors("default"), stored, strict=True):
            assert found.dtype == torch.float32
            # what bfloat16 rounded away, eps/2 = 2^-9 relative on each entry, and the correction is no larger
            assert float((found.detach() - wanted).norm()) < 2.0**-8 * float(wanted.norm())


def test_half_precision_factors_that_never_were_orthonormal_are_left_alone(tmp_path):
    published_checkpoint(tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: 1.5 * tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = PeftModel.from_pretrained(llama(), tmp_path)
    for name, layer in stella_layers(model).items():
        assert torch.equal(layer.factors("default")[0], tensors[f"{name}.stella_U.weight"].float())


def test_several_adapters_are_saved_apart_and_loaded_by_name(tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model = stir(adapted(base, target_modules=["q_proj"]))
    model.add_adapter("second", StellaConfig(r=3, target_modules=["q_proj", "up_proj"], stella_diag_s=True))
    stir(model, "second")
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "second" / "adapter_model.safetensors").keys()
    assert sum("up_proj" in key for key in keys) == 6
    if Version(peft.__version__) >= Version("0.20"):  # older ones write every adapter's tensors into every file
        assert not any("second" in key or "default" in key for key in keys)
        assert not any("up_proj" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "second", adapter_name="other")
    loaded.load_adapter(tmp_path, adapter_name="default")
    ids = tokens()
    for name, saved in (("default", "default"), ("other", "second")):
        loaded.set_adapter(name)
        model.set_adapter(saved)
        assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    published_checkpoint(tmp_path, r=4)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 5'))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_modules_to_save_are_trained_and_adapters_share_nothing(tmp_path):
    model = get_peft_model(
        llama(tie_word_embeddings=False), StellaConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert head
    assert all(p.requires_grad and bool((p.grad != 0).any()) for p in head)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")

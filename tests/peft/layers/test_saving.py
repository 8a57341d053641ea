"""Folders of adapters on embeddings and convolutions: our own, and LoRA's, out and in, as PEFT alone reads them."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from stella_kernels.peft import StellaConfig, convert_to_lora, save_as_lora
from stella_kernels.serving import export_adapter, import_adapter
from tests.peft.layers.bases import BASES, EXACT, TARGETS, Reader, base_and_input, one_layer, sentences
from tests.peft.models import (
    SAME_LOGITS,
    adapted,
    difference,
    llama,
    logits,
    orthonormality,
    stella_layers,
    stir,
    tokens,
    trained,
)

STARTS = ["rando", "pseudo_zero"]
# What float32 files leave of a float64 model: factors and products rounded once, four layers deep
STORED = 16 * torch.finfo(torch.float32).eps
# of which LoRA can have no part
BEYOND_LORA = ["1d, same", "1d, circular", "2d, dilation", "2d, reflect"]


def reader(**settings):
    base = Reader()
    return base, stir(adapted(copy.deepcopy(base), **{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **settings}))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("settings", [{}, {"stella_diag_s": True}, {"init_lora_weights": "pseudo_zero"}])
def test_save_and_load(tmp_path, settings, low_cpu_mem_usage):
    base, model = reader(**settings)
    batch = sentences()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    # float64 factors are stored as they are
    assert difference(loaded(*batch).detach(), model(*batch).detach()) < EXACT
    kinds = {"words": "embedding", "along": [6, 3], "picture": [3, 3, 3]}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["stella_layer_kinds"] == kinds
    assert loaded.peft_config["default"].stella_layer_kinds == kinds


def test_one_configuration_serves_two_models():
    config = StellaConfig(r=2, target_modules=["0"])
    get_peft_model(nn.Sequential(nn.Conv1d(3, 5, 3)), config)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5)), config)
    assert model.peft_config["default"].stella_layer_kinds == {}


@pytest.mark.parametrize("how", ["model", "files", "function", "bare"])
@pytest.mark.parametrize("settings", [{}, {"stella_diag_s": True, "rank_pattern": {"picture": 2}}, {"start": 1}])
def test_plain_lora_computes_the_same(tmp_path, settings, how):
    if settings.pop("start", None):
        settings["init_lora_weights"] = "pseudo_zero"
    base, model = reader(**settings)
    batch = sentences()
    if how == "model":
        save_as_lora(tmp_path / "lora", model, dtype=torch.float64)
    elif how == "files":
        model.save_pretrained(tmp_path / "stella")
        export_adapter(tmp_path / "stella", tmp_path / "lora", dtype=torch.float64)
    elif how == "bare":
        save_as_lora(tmp_path / "lora", model.base_model.model, dtype=torch.float64)
    if how == "function":
        config, tensors = convert_to_lora(model, dtype=torch.float64)
        served = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
        served.load_state_dict(
            {
                key.replace(".weight", ".default.weight") if "embedding" not in key else f"{key}.default": value
                for key, value in tensors.items()
            },
            strict=False,
        )
    else:
        served = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora", autocast_adapter_dtype=False)
    assert not stella_layers(served)
    served = served.double().eval()  # this PEFT may make the layers of an adapter in float32
    assert difference(served(*batch).detach(), model(*batch).detach()) < STORED


@pytest.mark.parametrize("name", [name for name in BASES if name not in BEYOND_LORA])
def test_every_kind_of_layer_goes_to_lora_and_comes_back(tmp_path, name):
    base, x = base_and_input(name, torch.float32)
    model, layer = one_layer(copy.deepcopy(base), use_rslora=True)
    wanted = model(x).detach()
    report = save_as_lora(tmp_path / "lora", model)
    assert report.ranks == {"0": 3}
    served = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path / "lora").eval()
    assert difference(served(x).detach(), wanted) < STORED
    theirs = served.base_model.model[0]
    assert difference(theirs.get_delta_weight("default"), layer.get_delta_weight("default").detach()) < STORED
    assert import_adapter(tmp_path / "lora", tmp_path / "stella") == {"0": 3}
    back = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path / "stella")
    assert difference(back(x).detach(), wanted) < STORED
    assert orthonormality(back) < STORED
    export_adapter(tmp_path / "stella", tmp_path / "again")  # import has written what kinds of layers they are
    again, first = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("again", "lora"))
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in first.items()}


@pytest.mark.parametrize("name", BEYOND_LORA)
def test_what_lora_does_not_compute_is_saved_and_not_exported(tmp_path, name):
    base, x = base_and_input(name, torch.float32)
    model, _ = one_layer(copy.deepcopy(base))
    model.save_pretrained(tmp_path / "stella")
    loaded = PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path / "stella")
    assert difference(loaded(x).detach(), model(x).detach()) < STORED
    message = r"^0: found a convolution with (dilation|padding_mode)=.*, wanted one that PEFT's LoRA computes"
    with pytest.raises(ValueError, match=message):
        save_as_lora(tmp_path / "lora", model)
    with pytest.raises(ValueError, match=message):
        export_adapter(tmp_path / "stella", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_pefts_own_conversion_refuses_what_it_would_write_as_linear_layers(tmp_path):
    conversion = pytest.importorskip("peft.tuners.lora.conversion", reason="this PEFT converts nothing")
    _, model = reader()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*(Conv|Embedding)"):
        conversion.save_as_lora(tmp_path, model, rank=3)


@torch.no_grad()
def lora(base, **settings):
    model = get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 5, **settings}), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"words": 9, "picture": 5}}])
def test_lora_of_every_kind_is_imported(tmp_path, settings, diagonal):
    base = Reader()
    theirs, batch = lora(copy.deepcopy(base), target_modules=TARGETS, **settings), sentences()
    theirs.save_pretrained(tmp_path / "lora")
    ranks = import_adapter(tmp_path / "lora", tmp_path / "stella", diagonal=diagonal)
    assert ranks["words"] == (6 if settings else 3)  # vectors of 6 numbers have no more
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "stella")
    assert difference(ours(*batch).detach(), theirs(*batch).detach()) < STORED
    assert orthonormality(ours) < STORED
    assert set(ours.peft_config["default"].stella_layer_kinds) == {"words", "along", "picture"}


def test_lora_of_a_convolution_with_groups_is_refused(tmp_path):
    theirs = lora(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)), r=4, target_modules=["0"])
    theirs.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"^0: found .*'A': \(4, 4, 3, 3\), .*wanted lora_A .* without groups"):
        import_adapter(tmp_path / "lora", tmp_path / "stella")
    assert not (tmp_path / "stella").exists()


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]])
def test_the_embedding_of_a_language_model(tmp_path, targets):
    base = llama(tie_word_embeddings=False)
    fresh, ids = copy.deepcopy(base), tokens()
    model = trained(base, target_modules=targets)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "stella")  # PEFT saves the embedding's own weight beside the adapter
    stored = load_file(tmp_path / "stella" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "stella")
    assert difference(logits(loaded, ids), wanted) < SAME_LOGITS
    export_adapter(tmp_path / "stella", tmp_path / "files")
    save_as_lora(tmp_path / "memory", model)
    for folder in ("files", "memory"):
        assert all(".lora_" in key for key in load_file(tmp_path / folder / "adapter_model.safetensors"))
        served = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / folder)
        assert difference(logits(served, ids), wanted) < SAME_LOGITS


def test_an_adapter_injected_into_a_bare_model(tmp_path):
    base = Reader()
    model = inject_adapter_in_model(StellaConfig(r=3, target_modules=TARGETS), copy.deepcopy(base))
    batch = sentences()
    save_as_lora(tmp_path, model, dtype=torch.float64)
    served = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False).double().eval()
    assert difference(served(*batch).detach(), model(*batch).detach()) < STORED

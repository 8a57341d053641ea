"""PEFT's own ``convert_to_lora`` and ``save_as_lora`` on our model: exact, or an error where the rank is too small."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

pytest.importorskip("peft.tuners.lora.conversion", reason="this PEFT converts nothing")

from peft import LoHaConfig, PeftModel, get_peft_model
from peft.tuners.lora import conversion

from stella_kernels.peft import StellaConfig
from stella_kernels.peft.lora_export import teach_conversion
from tests.peft.models import SAME_LOGITS, Mlp, adapted, difference, gpt2, llama, logits, stir, tokens, trained


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, 4),
        ({}, 6),
        ({"stella_diag_s": True, "use_rslora": True}, 4),
        ({"init_lora_weights": "pseudo_zero"}, 8),
        ({"rank_pattern": {"q_proj": 8, "up_proj": 2}}, 8),
        ({"target_modules": r".*\.(q_proj|up_proj)"}, 4),
        ({"rank_pattern": {"q_proj": 8}}, 1.0),
    ],
)
def test_exact_where_the_rank_suffices(tmp_path, settings, rank):
    base = llama()
    fresh = copy.deepcopy(base)
    model, ids = trained(base, **settings), tokens()
    conversion.save_as_lora(tmp_path, model, rank=rank)
    assert difference(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids)) < SAME_LOGITS


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({}, 3), ({"init_lora_weights": "pseudo_zero"}, 4), ({"rank_pattern": {"q_proj": 8}}, 4)],
)
def test_an_error_where_it_does_not(tmp_path, settings, rank):
    model = trained(llama(), **settings)
    with pytest.raises(
        ValueError, match=rf"^rank: found {rank} .*adapter has rank [48].*stella_kernels\.peft\.save_as_lora"
    ):
        conversion.save_as_lora(tmp_path, model, rank=rank)


def test_a_rank_too_small_in_name_only_is_exact(tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model, ids = adapted(base, init_lora_weights="pseudo_zero"), tokens()  # adds nothing yet
    conversion.save_as_lora(tmp_path, model, rank=1)
    assert (
        difference(logits(PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path), ids), logits(fresh, ids))
        < SAME_LOGITS
    )


def test_a_share_of_the_energy_cuts_each_layer(tmp_path):
    model = stir(adapted(llama(), target_modules=["q_proj", "up_proj"]))
    config, state = conversion.convert_to_lora(model, rank=0.5)
    for name, layer in model.named_modules():
        if f"{name}.lora_A.weight" in state:
            A, B = (state[f"{name}.lora_{kind}.weight"].double() for kind in "AB")
            values = torch.linalg.svdvals(layer.get_delta_weight("default").double())
            kept = 1 + int((values.square().cumsum(0) < 0.5 * values.square().sum()).sum())
            assert len(A) == kept == config.rank_pattern[name.removeprefix("base_model.model.")]
            assert torch.allclose(torch.linalg.svdvals(B @ A)[:kept], values[:kept], rtol=1e-5)


def test_conv1d_and_compilation(tmp_path):
    base = gpt2()
    fresh = copy.deepcopy(base)
    model, ids = stir(adapted(base, target_modules=["c_attn", "c_fc"])), tokens()
    conversion.save_as_lora(tmp_path, model, rank=4, compile_kwargs={"backend": "eager"})
    assert difference(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids)) < SAME_LOGITS


def test_a_layer_without_the_adapter_is_left_out():
    model = stir(adapted(llama(), target_modules=["q_proj"]))
    model.add_adapter("other", StellaConfig(r=3, target_modules=["up_proj"]))
    _, state = conversion.convert_to_lora(model, rank=3, adapter_name="other")
    assert {key.split(".")[-3] for key in state} == {"up_proj"}


def test_other_methods_are_converted_as_before_and_teaching_twice_changes_nothing():
    taught = conversion._convert_module_to_lora
    teach_conversion()
    assert conversion._convert_module_to_lora is taught
    model = get_peft_model(Mlp(torch.float32), LoHaConfig(r=2, target_modules=["up"], init_weights=False))
    layer = model.base_model.model.up
    A, B, rank = taught(layer, 8)
    assert rank == 8
    with torch.no_grad():
        assert difference(B @ A, layer.get_delta_weight("default")) < 1e-5

"""``stella_frozen_subspaces``: S alone is trained, by any optimizer, with nothing attached."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import Trainer

from stella_kernels.peft import StellaCallback, StellaConfig, StellaTrainer
from tests.peft.models import SAME_LOGITS, adapted, difference, llama, logits, stella_layers, tokens
from tests.peft.test_trainer import arguments, examples, has_step_hooks

TARGETS = ["q_proj", "up_proj"]


def trainable(model):
    return {name.split(".stella_")[-1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("way", ["trainer", "callback", "loop"])
def test_s_alone_is_trained(tmp_path, way, diagonal):
    base = llama()
    fresh = copy.deepcopy(base)
    model = adapted(
        base,
        target_modules=TARGETS,
        init_lora_weights="svd_major",
        stella_frozen_subspaces=True,
        stella_diag_s=diagonal,
    )
    assert trainable(model) == {"S"}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "stella_" in n}
    data = examples(32)
    if way == "loop":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for _ in range(4):
            loss = model(input_ids=data[0]["input_ids"][None], labels=data[0]["labels"][None]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
    else:
        kind, callbacks = (Trainer, [StellaCallback()]) if way == "callback" else (StellaTrainer, [])
        trainer = kind(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=data, callbacks=callbacks)
        trainer.train()
        assert not has_step_hooks(trainer.optimizer)
    for name, parameter in model.named_parameters():
        if "stella_" in name:
            assert torch.equal(parameter, start[name]) == ("stella_S" not in name)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True).eval()
    assert trainable(loaded) == {"S"}
    ids = tokens()
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS


def test_subspaces_stay_frozen_through_peft_s_switches():
    model = adapted(llama(), target_modules=TARGETS, stella_frozen_subspaces=True)
    model.add_adapter("other", StellaConfig(r=2, target_modules=TARGETS))
    model.set_adapter("other")
    assert trainable(model) == {"U", "S", "Vt"}
    model.set_adapter("default")
    assert trainable(model) == {"S"}
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == {"S"}
    for layer in stella_layers(model).values():
        layer.set_requires_grad("default", False)
        layer.set_requires_grad("default", True)
    assert trainable(model) == {"S"}
    model.base_model.set_adapter(["default", "other"])
    assert {n.split(".stella_")[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "S.default.weight",
        "U.other.weight",
        "S.other.weight",
        "Vt.other.weight",
    }


def test_the_field_is_checked():
    with pytest.raises(TypeError, match=r"^stella_frozen_subspaces: found 1"):
        StellaConfig(stella_frozen_subspaces=1)
    with pytest.raises(ValueError, match=r"^stella_frozen_subspaces: found True with stella_geometry='quotient'"):
        StellaConfig(stella_frozen_subspaces=True, stella_geometry="quotient")


def test_peft_s_switch_against_casting_inputs_changes_nothing():
    model, ids = adapted(llama(), target_modules=TARGETS), tokens()
    before = logits(model, ids)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, ids), before)
    assert all(layer.cast_input_dtype_enabled for layer in stella_layers(model).values())

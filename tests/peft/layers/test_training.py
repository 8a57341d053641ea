"""Training embeddings and convolutions: on the manifold by every way of training, ranks cut, subspaces frozen."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel
from transformers import Trainer

from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.peft import RankSchedule, StellaCallback, StellaConfig, StellaTrainer, reduce_rank
from tests.peft.layers.bases import EXACT, TARGETS, Reader, merged_by_hand, sentences, update
from tests.peft.models import SAME_LOGITS, adapted, difference, llama, logits, orthonormality, stella_layers, tokens
from tests.peft.test_trainer import ON_MANIFOLD, arguments, examples

pytestmark = pytest.mark.usefixtures("one_thread")


DIAGONAL, WITH_START = {"stella_diag_s": True}, {"init_lora_weights": "pseudo_zero"}


@pytest.mark.parametrize(
    ("way", "settings"),
    [(way, {}) for way in ("fused", "polar", "exp_map", "qr", "cayley")]
    + [(way, settings) for way in ("fused", "polar") for settings in (DIAGONAL, WITH_START)],
)
def test_a_loop_trains_every_kind_on_the_manifold(way, settings):
    base = Reader(torch.float32)
    model = adapted(base, **{"r": 3, "target_modules": TARGETS, **settings}).train()
    fresh, before = copy.deepcopy(model), orthonormality(model)
    batch, target = sentences(torch.float32), torch.randn(4, 4)
    if way == "fused":
        optimizer = StellaAdamW(model, lr=1e-2, grad_scaling=12)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        attach(optimizer, model, grad_scaling=12, retraction=way)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(*batch) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert max(orthonormality(model), before) < ON_MANIFOLD
    for new, old in zip(stella_layers(model).values(), stella_layers(fresh).values(), strict=True):
        for moved, start in zip(new.factors("default"), old.factors("default"), strict=True):
            assert difference(moved.detach(), start.detach()) > 1e-3


def language_model(**settings):
    base = llama(tie_word_embeddings=False)
    return copy.deepcopy(base), adapted(base, **{"r": 4, "target_modules": ["embed_tokens", "q_proj"], **settings})


@pytest.mark.parametrize("way", ["trainer", "callback", "fused"])
def test_the_trainer_trains_saves_and_cuts_an_embedding(tmp_path, way):
    fresh, model = language_model(r=6)
    schedule = RankSchedule(budget=9, begin=0.1, end=0.6, cuts=3)
    trainer = (Trainer if way == "callback" else StellaTrainer)(
        model=model,
        args=arguments(tmp_path, max_steps=12, logging_steps=1),
        train_dataset=examples(32),
        callbacks=[schedule, StellaCallback()] if way == "callback" else [schedule],
        optimizers=(StellaAdamW(model, lr=5e-3), None) if way == "fused" else (None, None),
    )
    trainer.train()
    assert sum(layer.r["default"] for layer in stella_layers(model).values()) == 9
    assert orthonormality(model) < ON_MANIFOLD
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    ids = tokens()
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS


def test_frozen_subspaces_train_s_alone():
    model = adapted(Reader(), r=3, target_modules=TARGETS, stella_frozen_subspaces=True, init_lora_weights="svd_major")
    names = {name.split(".default")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"stella_S"}
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(*sentences()).square().sum().backward()
    optimizer.step()
    for new, old in zip(stella_layers(model).values(), stella_layers(before).values(), strict=True):
        (U, S, Vt), (U0, S0, V0t) = new.factors("default"), old.factors("default")
        assert torch.equal(U, U0)
        assert torch.equal(Vt, V0t)
        assert not torch.equal(S, S0)


@pytest.mark.parametrize("settings", [{"rank": 2}, {"budget": 7}, {"energy": 0.8}])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_cut_is_the_truncated_svd_of_every_layer(settings, diagonal):
    model = adapted(Reader(), r=4, target_modules=TARGETS, stella_diag_s=diagonal)
    with torch.no_grad():
        for layer in stella_layers(model).values():
            layer.factors("default")[1].normal_()
    before = {name: update(layer).detach() for name, layer in stella_layers(model).items()}
    ranks = reduce_rank(model, **settings)
    assert sum(ranks.values()) < 16
    for name, layer in stella_layers(model).items():
        left, values, right = torch.linalg.svd(before[name], full_matrices=False)
        k = layer.r["default"]
        # an SVD is exact to a few eps of the largest singular value
        assert difference(update(layer).detach(), (left[:, :k] * values[:k]) @ right[:k]) < 10 * EXACT
    assert orthonormality(model) < EXACT


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_sums_of_adapters(tmp_path, kind):
    base = Reader()
    model = adapted(copy.deepcopy(base), r=3, target_modules=TARGETS)
    model.add_adapter("other", StellaConfig(r=2, target_modules=["words", "picture"], stella_diag_s=True))
    parts = {
        name: [update(layer, adapter).detach() for adapter in layer.r] for name, layer in stella_layers(model).items()
    }
    model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "sum", combination_type=kind)
    for name, layer in stella_layers(model).items():
        first, *rest = parts[name]
        wanted = 0.7 * first - sum(0.3 * each for each in rest)
        if kind == "svd":
            left, values, right = torch.linalg.svd(wanted, full_matrices=False)
            wanted = (left[:, :3] * values[:3]) @ right[:3]
        assert difference(update(layer, "sum").detach(), wanted) < 10 * EXACT
    model.set_adapter("sum")
    batch = sentences()
    found = model(*batch).detach()
    assert difference(found, merged_by_hand(model, base, "sum")(*batch).detach()) < 10 * EXACT
    model.delete_adapter("default")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum")
    assert difference(loaded(*batch).detach(), found) < 10 * EXACT

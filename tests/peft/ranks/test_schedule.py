"""``RankSchedule``: from a high rank to a budget while training, for every way of training, resumed and saved."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel
from transformers import Trainer

from stella_kernels.optim import StellaAdamW
from stella_kernels.peft import RankSchedule, StellaCallback, StellaTrainer
from tests.peft.models import SAME_LOGITS, adapted, difference, llama, logits, orthonormality, stella_layers, tokens
from tests.peft.test_trainer import ON_MANIFOLD, arguments, examples


def model_for_training(**settings):
    return adapted(llama(), **{"r": 8, "target_modules": ["q_proj", "k_proj", "up_proj"], **settings})


def total_rank(model):
    return sum(layer.r["default"] for layer in stella_layers(model).values())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("way", ["trainer", "callback", "fused"])
def test_training_ends_within_its_budget_on_the_manifold(tmp_path, way, diagonal):
    base = llama()
    fresh = copy.deepcopy(base)
    model = adapted(base, r=8, target_modules=["q_proj", "k_proj", "up_proj"], stella_diag_s=diagonal)
    schedule = RankSchedule(budget=15, begin=0.1, end=0.6, cuts=4)
    callbacks = [schedule, StellaCallback()] if way == "callback" else [schedule]
    optimizers = (StellaAdamW(model, lr=5e-3), None) if way == "fused" else (None, None)
    trainer = (Trainer if way == "callback" else StellaTrainer)(
        model=model,
        args=arguments(tmp_path, max_steps=20, logging_steps=1),
        train_dataset=examples(64),
        callbacks=callbacks,
        optimizers=optimizers,
    )
    trainer.train()
    steps, ranks = zip(*schedule.history, strict=True)
    assert len(steps) == 4
    assert min(steps) > 2
    assert max(steps) == 12
    assert list(ranks) == sorted(ranks, reverse=True)
    assert ranks[-1] == total_rank(model) == 15
    assert orthonormality(model) < ON_MANIFOLD
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[12] < losses[0]  # it trains on after the last cut
    model.eval().save_pretrained(tmp_path / "adapter")
    ids = tokens()
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert total_rank(loaded) == 15
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS


def test_a_checkpoint_after_a_cut_resumes_to_where_an_uninterrupted_run_ends(tmp_path):
    base, data = llama(), examples(64)
    fresh = copy.deepcopy(base)

    def run(model, resume=None):
        trainer = StellaTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=10, save_strategy="steps", save_steps=7),
            train_dataset=data,
            callbacks=[RankSchedule(budget=12, begin=0.1, end=0.5, cuts=2)],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    torch.manual_seed(1)
    whole = run(adapted(base, r=6, target_modules=["q_proj", "up_proj"]))
    checkpoint = str(tmp_path / "checkpoint-7")
    resumed = run(PeftModel.from_pretrained(fresh, checkpoint, is_trainable=True), checkpoint)
    for name, layer in stella_layers(whole).items():
        for one, other in zip(layer.factors("default"), stella_layers(resumed)[name].factors("default"), strict=True):
            assert one.shape == other.shape
            # float32 sums of another order, over 3 steps of 5e-3
            assert float((one - other).detach().abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("budget", {"budget": 0}),
        ("budget", {"budget": 2.5}),
        ("cuts", {"budget": 9, "cuts": 0}),
        ("begin", {"budget": 9, "begin": "early"}),
        ("begin, end", {"budget": 9, "begin": 0.5, "end": 0.4}),
        ("begin, end", {"budget": 9, "end": 1.0}),
    ],
)
def test_bad_arguments_are_named(argument, settings):
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: found"):
        RankSchedule(**settings)


@pytest.mark.parametrize(
    ("message", "budget", "settings"),
    [
        ("budget: found 5, wanted 6", 5, {}),
        ("budget: found 49, wanted 6 .* to 48", 49, {}),
        ("init_lora_weights: found 'pseudo_zero'", 12, {"init_lora_weights": "pseudo_zero"}),
    ],
)
def test_what_cannot_be_scheduled_is_refused_before_training(tmp_path, message, budget, settings):
    model = model_for_training(**settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = StellaTrainer(
        model=model, args=arguments(tmp_path), train_dataset=examples(), callbacks=[RankSchedule(budget)]
    )
    with pytest.raises(ValueError, match=rf"^{message}"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

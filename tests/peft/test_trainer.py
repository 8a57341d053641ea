"""Training with transformers' Trainer: StellaTrainer, the mixin, the callback, resuming."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.peft import (
    StellaCallback,
    StellaConfig,
    StellaTrainer,
    StellaTrainerMixin,
    attach_adapter,
    parameter_groups,
)
from stella_kernels.peft.trainer import adapter_settings
from tests.peft.models import adapted, llama, orthonormality, stella_layers, tokens

LEARNING_RATE = 5e-3


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch",
    }
    return TrainingArguments(**{**defaults, **settings})


def examples(count: int = 8) -> list[dict[str, Tensor]]:
    """The same example again and again: whatever the order of batches, training is the same."""
    ids = tokens(rows=1)[0]
    return [{"input_ids": ids, "labels": ids}] * count


def model_for_training(**settings: Any) -> nn.Module:
    return adapted(llama(layers=1), target_modules=["q_proj", "k_proj", "up_proj"], **settings)


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "stella_" in n}


def has_step_hooks(optimizer: Any) -> bool:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


# A float32 factor of 48 rows and 4 columns on its manifold; exp_map and cayley add the drift of a few steps.
ON_MANIFOLD = 2e-5


@pytest.mark.parametrize("retraction", ["polar", "exp_map", "qr", "cayley"])
@pytest.mark.parametrize("grad_scaling", [True, False, 7.0])
def test_trainer_steps_as_a_loop_with_attach_does(tmp_path, retraction, grad_scaling):
    model = model_for_training(stella_retraction=retraction, stella_grad_scaling=grad_scaling)
    by_hand, before, data = copy.deepcopy(model).train(), factors(model), examples()
    trainer = StellaTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=data)
    trainer.train()

    optimizer = torch.optim.AdamW(parameter_groups(by_hand, 0.1), lr=LEARNING_RATE)
    d = 32.0 if grad_scaling is True else grad_scaling  # the hidden size of the model
    attach(optimizer, by_hand, retraction=retraction, grad_scaling=d)
    batch = {key: value.repeat(2, 1) for key, value in data[0].items()}
    for _ in range(4):
        optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        optimizer.step()

    found, wanted = factors(model), factors(by_hand)
    for name in wanted:
        # Adam divides by sqrt(v): a rounding of the gradient may move an entry that has next to none by a part of a
        # step. With another scaling or retraction factors differ by 0.06 steps and more (exp_map and cayley by less).
        assert float((found[name] - wanted[name]).abs().max()) < 0.02 * LEARNING_RATE, name
        assert float((found[name] - before[name]).abs().max()) > 0.5 * LEARNING_RATE, name
    assert orthonormality(model) < ON_MANIFOLD


@pytest.mark.parametrize("retraction", ["polar", "exp_map", "qr", "cayley"])
def test_settings_are_the_active_adapters(retraction):
    model = model_for_training(stella_retraction="polar", stella_grad_scaling=False)
    model.add_adapter(
        "second", StellaConfig(target_modules=["q_proj"], stella_retraction=retraction, stella_grad_scaling=64.0)
    )
    assert adapter_settings(model) == ("polar", False, "stiefel")
    model.set_adapter("second")
    assert adapter_settings(model) == (retraction, 64.0, "stiefel")


def test_the_configured_scaling_matters(tmp_path):
    model = model_for_training()
    data, results = examples(), []
    for scaling in (True, False):
        twin = copy.deepcopy(model)
        twin.peft_config["default"].stella_grad_scaling = scaling
        StellaTrainer(model=twin, args=arguments(tmp_path), train_dataset=data).train()
        results.append(factors(twin))
    # k_proj has 16 outputs and 32 is the hidden size: only factors with n != 32 are scaled
    differences = {n: float((results[0][n] - results[1][n]).abs().max()) / LEARNING_RATE for n in results[0]}
    assert max(v for n, v in differences.items() if "k_proj.stella_U" in n or "up_proj.stella_U" in n) > 0.2


def test_factors_take_no_weight_decay_and_s_does(tmp_path):
    model = model_for_training()
    trainer = StellaTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=examples())
    optimizer = trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for layer in stella_layers(model).values():
        assert [decay[id(w)] for w in layer.factors("default")] == [0.0, 0.1, 0.0]
    assert not [n for n in trainer.get_decay_parameter_names(model) if "stella_U" in n or "stella_Vt" in n]


def test_a_plain_trainer_leaves_the_manifold(tmp_path):
    model = model_for_training()
    Trainer(model=model, args=arguments(tmp_path), train_dataset=examples()).train()
    assert orthonormality(model) > 100 * ON_MANIFOLD


@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.1}, {"gradient_checkpointing": True}],
)
def test_stays_on_the_manifold_with_trainer_options(tmp_path, settings):
    model = model_for_training(lora_dropout=0.1)
    before = factors(model)
    StellaTrainer(model=model, args=arguments(tmp_path, **settings), train_dataset=examples(16)).train()
    assert orthonormality(model) < ON_MANIFOLD
    assert all(p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in factors(model).items())


def test_training_twice_attaches_once(tmp_path):
    trainer = StellaTrainer(model=model_for_training(), args=arguments(tmp_path), train_dataset=examples())
    trainer.train()
    first = trainer.attachment
    trainer.train()
    assert trainer.attachment is first
    assert orthonormality(trainer.model) < ON_MANIFOLD


def test_mixin_serves_another_trainer(tmp_path):
    class Mine(Trainer):
        pass

    class MineWithStella(StellaTrainerMixin, Mine):
        pass

    trainer = MineWithStella(
        model=model_for_training(), args=arguments(tmp_path, weight_decay=0.1), train_dataset=examples()
    )
    trainer.train()
    assert orthonormality(trainer.model) < ON_MANIFOLD


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_training_is_refused(tmp_path, name):
    trainer = StellaTrainer(model=model_for_training(), args=arguments(tmp_path), train_dataset=examples())
    setattr(trainer, name, True)
    with pytest.raises(NotImplementedError, match="wanted FSDP2"):
        trainer.create_optimizer()
    assert trainer.optimizer is None


@pytest.mark.parametrize("with_callback", [False, True])
def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path, with_callback, caplog):
    caplog.set_level(logging.ERROR)
    model, data = model_for_training(), examples()
    resumed = copy.deepcopy(model)

    def trainer(model: nn.Module) -> Trainer:
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, weight_decay=0.0 if with_callback else 0.1)
        if with_callback:
            return Trainer(model=model, args=args, train_dataset=data, callbacks=[StellaCallback()])
        return StellaTrainer(model=model, args=args, train_dataset=data)

    trainer(model).train()
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, wanted in factors(model).items():
        assert float((factors(resumed)[name] - wanted).abs().max()) < 0.02 * LEARNING_RATE, name
    assert orthonormality(resumed) < ON_MANIFOLD


def test_callback_attaches_for_the_run_and_detaches_after_it(tmp_path):
    model, data = model_for_training(), examples()
    twin = copy.deepcopy(model)
    callback = StellaCallback()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data, callbacks=[callback])
    trainer.train()
    StellaTrainer(model=twin, args=arguments(tmp_path), train_dataset=data).train()
    for name, wanted in factors(twin).items():
        assert float((factors(model)[name] - wanted).abs().max()) < 0.02 * LEARNING_RATE, name
    assert callback.attachment is None
    assert not has_step_hooks(trainer.optimizer)


@pytest.mark.parametrize("with_callback", [False, True])
def test_a_fused_optimizer_trains_as_the_default_one_does(tmp_path, with_callback):
    model, data = model_for_training(), examples()
    twin, before = copy.deepcopy(model), factors(model)
    optimizer = StellaAdamW(model, lr=LEARNING_RATE, weight_decay=0.1)
    kind, settings = (Trainer, {"callbacks": [StellaCallback()]}) if with_callback else (StellaTrainer, {})
    args = arguments(tmp_path, weight_decay=0.1)
    kind(model=model, args=args, train_dataset=data, optimizers=(optimizer, None), **settings).train()
    StellaTrainer(model=twin, args=args, train_dataset=data).train()
    for name, wanted in factors(twin).items():
        assert float((factors(model)[name] - wanted).abs().max()) < 0.02 * LEARNING_RATE, name
        assert not torch.equal(factors(model)[name], before[name])
    assert not has_step_hooks(optimizer)


@pytest.mark.parametrize(
    ("configured", "message"),
    [({"stella_retraction": "qr"}, "StellaAdamW.*'qr'"), ({"stella_grad_scaling": False}, r"width 32\.0, wanted None")],
)
def test_a_fused_optimizer_that_disagrees_with_the_adapter_is_refused(tmp_path, configured, message):
    model = model_for_training(**configured)
    before, optimizer = factors(model), StellaAdamW(model, lr=LEARNING_RATE)
    trainer = StellaTrainer(
        model=model, args=arguments(tmp_path), train_dataset=examples(), optimizers=(optimizer, None)
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in factors(model).items())


def test_callback_refuses_weight_decay_and_its_advice_works(tmp_path):
    model, data = model_for_training(), examples()
    before = factors(model)
    args = arguments(tmp_path, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay: found 0\.1 .*stella_U.*StellaTrainer.*parameter_groups"):
        Trainer(model=model, args=args, train_dataset=data, callbacks=[StellaCallback()]).train()
    assert all(torch.equal(p, before[n]) for n, p in factors(model).items())
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=LEARNING_RATE)
    Trainer(
        model=model, args=args, train_dataset=data, callbacks=[StellaCallback()], optimizers=(optimizer, None)
    ).train()
    assert orthonormality(model) < ON_MANIFOLD


def test_parameter_groups_hold_every_trainable_parameter_once():
    model = model_for_training(modules_to_save=["lm_head"])
    constrained, others = parameter_groups(model, 0.3)
    assert (constrained["weight_decay"], others["weight_decay"]) == (0.0, 0.3)
    assert {id(p) for p in constrained["params"]} == {id(f.parameter) for f in stiefel_factors(model)}
    found = [id(p) for group in (constrained, others) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_adapters_that_disagree_and_models_without_one_are_refused():
    model = model_for_training()
    model.add_adapter("second", StellaConfig(target_modules=["q_proj"], stella_retraction="qr"))
    model.base_model.set_adapter(["default", "second"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    with pytest.raises(ValueError, match=r"disagree on.*'polar'.*'qr'"):
        attach_adapter(optimizer, model)
    with pytest.raises(ValueError, match="no active StelLA adapter"):
        attach_adapter(optimizer, llama())
    assert not has_step_hooks(optimizer)
    model.set_adapter("second")
    attachment = attach_adapter(optimizer, model)
    assert all(".second." in factor.name for factor in attachment.factors)

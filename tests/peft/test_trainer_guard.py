"""What a Trainer refuses before it trains, and what it says of factors that left the manifold after the last step."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from stella_kernels import diagnostics
from stella_kernels.nn import restore_masters, stiefel_factors
from stella_kernels.optim import StellaAdamW
from stella_kernels.peft import StellaCallback, StellaConfig, StellaTrainer, attach_adapter
from tests.peft.models import adapted, llama, orthonormality
from tests.peft.test_trainer import ON_MANIFOLD, arguments, examples


class Plain(nn.Module):
    """A model that says nothing of its width."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.fc(x).square().mean()}


PLAIN_DATA = [{"x": torch.ones(8), "labels": 0}] * 4


def by_trainer(model: nn.Module, data: Any) -> None:
    folder = Path(tempfile.mkdtemp())
    StellaTrainer(model=model, args=arguments(folder, max_steps=1), train_dataset=data).train()


def by_callback(model: nn.Module, data: Any) -> None:
    args = arguments(Path(tempfile.mkdtemp()), max_steps=1)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[StellaCallback()]).train()


def by_hand(model: nn.Module, data: Any) -> None:
    held = [p for n, p in model.named_parameters() if "stella_" in n]
    attach_adapter(torch.optim.AdamW(held, weight_decay=0.0), model)


every_way = pytest.mark.parametrize("start", [by_trainer, by_callback, by_hand])


@every_way
def test_a_model_without_a_hidden_size_names_the_field_of_the_configuration(start: Callable[..., None]) -> None:
    model = get_peft_model(Plain(), StellaConfig(r=2, target_modules=["fc"]))
    with pytest.raises(ValueError, match=r"^stella_grad_scaling: .*Plain has no config\.hidden_size.*StellaConfig\(st"):
        start(model, PLAIN_DATA)
    model.peft_config["default"].stella_grad_scaling = 8.0  # the advice
    start(model, PLAIN_DATA)


def test_a_hidden_size_that_is_wrong_is_said_to_be() -> None:
    model = get_peft_model(Plain(), StellaConfig(r=2, target_modules=["fc"]))
    model.base_model.model.config = {"hidden_size": -4}
    with pytest.raises(ValueError, match=r"hidden_size"):
        by_hand(model, None)


@every_way
def test_an_adapter_loaded_for_inference_is_told_how_to_be_trained(start: Callable[..., None], tmp_path: Path) -> None:
    adapted(llama(), r=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trainable StelLA factor.*is_trainable=True"):
        start(PeftModel.from_pretrained(llama(), tmp_path), examples())
    with pytest.raises(ValueError, match=r"target: found .*is_trainable=True"):
        diagnostics.orthonormality(PeftModel.from_pretrained(llama(), tmp_path))
    start(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True), examples())


def cast_as_trl_does(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@every_way
def test_masters_that_something_cast_are_refused_and_the_advice_works(start: Callable[..., None]) -> None:
    model = cast_as_trl_does(adapted(llama(), r=2))
    with pytest.raises(
        ValueError, match=r"stella_U\.default\.weight: found torch\.bfloat16, .*restore_masters\(model\)"
    ):
        start(model, examples())
    assert len(restore_masters(model)) == len(stiefel_factors(model))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    start(model, examples())
    assert orthonormality(model) < ON_MANIFOLD


def test_a_fused_optimizer_does_not_hide_them(tmp_path: Path) -> None:
    model = adapted(llama(), r=2)
    optimizer = StellaAdamW(model, lr=1e-3)
    cast_as_trl_does(model)
    trainer = StellaTrainer(
        model=model, args=arguments(tmp_path), train_dataset=examples(), optimizers=(optimizer, None)
    )
    with pytest.raises(ValueError, match="restore_masters"):
        trainer.train()


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half().float(), lambda m: m])
@pytest.mark.parametrize("autocast", [True, False])
def test_casts_of_the_model_are_a_choice(cast: Callable[[nn.Module], nn.Module], autocast: bool) -> None:
    config = StellaConfig(r=2, target_modules=["q_proj"])
    model = cast(get_peft_model(llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast))
    by_hand(model, None)


class Averages(TrainerCallback):
    """Puts a mean of weights in their place when asked to, as averaging wrappers do after the last step."""

    def __init__(self, event: str, factor: float = 0.9) -> None:
        setattr(self, event, self._move)
        self.factor = factor

    @torch.no_grad()
    def _move(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for factor in stiefel_factors(kwargs["model"]):
            factor.parameter.mul_(self.factor)


def trainer_with(callback: TrainerCallback, folder: Path, with_callback: bool = False, **settings: Any) -> Trainer:
    model = adapted(llama(), r=2, **settings.pop("config", {}))
    kind, callbacks = (Trainer, [callback, StellaCallback()]) if with_callback else (StellaTrainer, [callback])
    return kind(model=model, args=arguments(folder, **settings), train_dataset=examples(), callbacks=callbacks)


@pytest.mark.parametrize("with_callback", [False, True])
def test_factors_moved_after_the_last_step_are_warned_of_and_not_saved(tmp_path: Path, with_callback: bool) -> None:
    trainer = trainer_with(Averages("on_train_end"), tmp_path, with_callback)
    with pytest.warns(
        RuntimeWarning, match=r"after training, found .*stella_\w+\.default\.weight.*stella_kernels\.polar"
    ):
        trainer.train()
    if with_callback:
        return
    with pytest.raises(ValueError, match=r"found .*stella_.*nothing was saved"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()
    for factor in stiefel_factors(trainer.model):  # the advice
        factor.view.copy_(torch.ops.stella_kernels.polar(factor.view, "auto")[0])
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("with_callback", [False, True])
def test_a_checkpoint_off_the_manifold_is_written_with_a_warning(tmp_path: Path, with_callback: bool) -> None:
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_with(Averages("on_step_end"), tmp_path, with_callback, **settings)
    with pytest.warns(RuntimeWarning, match=r"in the checkpoint that .*found .*stella_"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("retraction", ["polar", "exp_map", "qr", "cayley"])
def test_a_sound_run_is_quiet(tmp_path: Path, retraction: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 5e-2}
    nothing = TrainerCallback()
    trainer = trainer_with(nothing, tmp_path, config={"stella_retraction": retraction}, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))


def test_without_a_constraint_there_is_nothing_to_say(tmp_path: Path) -> None:
    trainer = trainer_with(Averages("on_train_end"), tmp_path, config={"stella_geometry": "euclidean"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    assert diagnostics.off_manifold(trainer.model)


def test_the_twin_of_a_run_is_left_alone(tmp_path: Path) -> None:
    """Looking changes nothing: the factors after a run with checkpoints are those of a run without."""
    first = trainer_with(TrainerCallback(), tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=1)
    second_model = copy.deepcopy(first.model)
    first.train()
    args = arguments(tmp_path / "b", max_steps=2)
    StellaTrainer(model=second_model, args=args, train_dataset=first.train_dataset).train()
    for a, b in zip(stiefel_factors(first.model), stiefel_factors(second_model), strict=True):
        assert torch.equal(a.parameter, b.parameter)


def two_adapters() -> tuple[Any, Callable[[], None]]:
    config: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model: Any = get_peft_model(llama(), StellaConfig(**config))
    model.add_adapter("b", StellaConfig(**config))
    ids = torch.arange(12).reshape(2, 6)
    return model, lambda: model(input_ids=ids, labels=ids).loss.backward()


def optimizer_of(kind: str, model: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "fused":
        return StellaAdamW(parameters, factors=model, weight_decay=0.0, lr=1e-2, grad_scaling=False)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, lr=1e-2)
    attach_adapter(optimizer, model)
    return optimizer


@pytest.mark.parametrize("kind", ["attach", "fused"])
@pytest.mark.parametrize("stale", [False, True])
def test_adapters_of_one_optimizer_take_turns(kind: str, stale: bool) -> None:
    model, backward = two_adapters()
    if stale:
        model.set_adapter("b")
        backward()
        model.set_adapter("default")
    optimizer = optimizer_of(kind, model, [p for n, p in model.named_parameters() if "stella_" in n])
    for step in range(6):
        if step == 3:
            model.set_adapter("b")
        if step:
            optimizer.zero_grad(set_to_none=not stale)
        backward()
        optimizer.step()
    for name in ("default", "b"):
        model.set_adapter(name)
        assert orthonormality(model) < ON_MANIFOLD


@pytest.mark.parametrize("kind", ["attach", "fused"])
@pytest.mark.parametrize("to_none", [False, True])
def test_an_adapter_that_the_optimizer_was_not_told_of_is_an_error(kind: str, to_none: bool) -> None:
    model, backward = two_adapters()
    optimizer = optimizer_of(kind, model, [p for p in model.parameters() if p.requires_grad])

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad(set_to_none=to_none)
            backward()
            optimizer.step()

    steps()
    model.set_adapter("b")
    with pytest.raises(ValueError, match=r"optimizer: it does not hold .*stella_U\.b\.weight.* never move"):
        steps()

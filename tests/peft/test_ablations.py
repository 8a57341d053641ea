"""The paper's ablations through PEFT: starts that leave the output alone, geometries, diagnostics in training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from stella_kernels.nn import stiefel_factors
from stella_kernels.peft import DiagnosticsCallback, StellaConfig, StellaTrainer, attach_adapter
from stella_kernels.reference import stiefel
from tests.peft.models import Mlp, adapted, difference, gpt2, llama, logits, stella_layers, tokens

F64 = torch.float64
TINY = 1e-12  # float64, products of at most 24 terms, relative


def train(model: nn.Module, steps: int = 5, lr: float | None = None) -> list[float]:
    """A least-squares fit by SGD, or AdamW at ``lr``, with the adapter's geometry; the losses."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0) if lr else torch.optim.SGD(trainable, lr=0.1)
    attachment = attach_adapter(optimizer, model)
    x, target, losses = torch.randn(16, 8, dtype=F64), torch.randn(16, 3, dtype=F64), []
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        if step < steps:
            loss.backward()
            optimizer.step()
    attachment.remove()
    return losses


@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("init", ["zero", "pseudo_zero"])
def test_zero_starts_give_the_base_output_and_leave_its_weights(init: str, diag_s: bool) -> None:
    base, x = Mlp(), torch.randn(5, 8, dtype=F64)
    wanted, weights = base(x).detach(), {n: p.clone() for n, p in base.named_parameters()}
    model = adapted(
        copy.deepcopy(base), init_lora_weights=init, stella_diag_s=diag_s, lora_alpha=12, r=3, stella_grad_scaling=False
    )
    assert difference(model(x).detach(), wanted) < TINY
    train(model)
    assert difference(model(x).detach(), wanted) > 1e-3
    for name, weight in weights.items():
        module, kind = name.rsplit(".", 1)
        assert torch.equal(getattr(model.base_model.model.get_submodule(module).get_base_layer(), kind), weight)
    with model.disable_adapter():
        assert difference(model(x).detach(), wanted) < TINY


def test_pseudo_zero_is_the_first_adapter_subtracted_from_the_weight() -> None:
    """The paper's definition, beside it: the same model with the base weights changed, trained the same way."""
    base = Mlp()
    ours = adapted(copy.deepcopy(base), init_lora_weights="pseudo_zero", stella_grad_scaling=False, r=3)
    literal = adapted(copy.deepcopy(base), init_lora_weights="rando", stella_grad_scaling=False, r=3)
    pairs = list(zip(stella_layers(ours).values(), stella_layers(literal).values(), strict=True))
    with torch.no_grad():
        for layer, other in pairs:
            for mine, its in zip(layer.factors("default"), other.factors("default"), strict=True):
                its.copy_(mine)
            other.get_base_layer().weight -= other.get_delta_weight("default")
    for model in (ours, literal):
        torch.manual_seed(7)
        train(model)
    for layer, other in pairs:
        for mine, its in zip(layer.factors("default"), other.factors("default"), strict=True):
            assert difference(mine.detach(), its.detach()) < 1e-10
    names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert names == {n for n, p in literal.named_parameters() if p.requires_grad}  # the start is not trained


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_pseudo_zero_is_saved_and_loaded_onto_a_fresh_base(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    base, ids = llama(layers=1), tokens()
    model = adapted(copy.deepcopy(base), init_lora_weights="pseudo_zero", stella_grad_scaling=False)
    with torch.no_grad():
        for layer in stella_layers(model).values():
            layer.factors("default")[1].normal_()
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, ids), wanted)
    assert difference(wanted, logits(base, ids)) > 1e-3
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("build", [lambda: llama(layers=1, dtype=F64), lambda: gpt2().double()], ids=["llama", "gpt2"])
def test_pseudo_zero_merges_unmerges_deletes_and_unloads(build: Any) -> None:
    base, ids = build(), tokens()
    plain = logits(base, ids)
    model = adapted(copy.deepcopy(base), init_lora_weights="pseudo_zero", target_modules="all-linear")
    with torch.no_grad():
        for layer in stella_layers(model).values():
            layer.factors("default")[1].normal_()
    wanted = logits(model, ids)
    assert difference(wanted, plain) > 1e-3
    model.merge_adapter()
    assert difference(logits(model, ids), wanted) < 1e-10
    model.unmerge_adapter()
    assert difference(logits(model, ids), wanted) < 1e-10
    model.add_adapter("other", StellaConfig(r=2, target_modules="all-linear", init_lora_weights="zero"))
    model.set_adapter("other")
    assert difference(logits(model, ids), plain) < 1e-10  # the start of the first adapter is its own
    model.set_adapter("default")
    model.delete_adapter("other")
    assert all(set(layer.stella_U0) == {"default"} for layer in stella_layers(model).values())
    assert difference(logits(model.merge_and_unload(), ids), wanted) < 1e-10


def test_a_start_stays_in_full_precision_in_a_half_precision_model() -> None:
    model = adapted(llama(layers=1), init_lora_weights="pseudo_zero").to(torch.bfloat16)
    for layer in stella_layers(model).values():
        start = layer.start("default")
        assert start is not None
        assert {t.dtype for t in start} == {torch.float32}
        assert float(stiefel.orthonormality_error(start[0])) < 1e-5


@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("geometry", ["stiefel", "euclidean", "quotient"])
@pytest.mark.parametrize("init", [True, "rando", "svd_major", "svd_minor", "zero", "pseudo_zero"])
def test_every_start_and_geometry_trains(init: bool | str, geometry: str, diag_s: bool) -> None:
    settings: dict[str, Any] = {"stella_geometry": geometry, "stella_diag_s": diag_s, "init_lora_weights": init}
    if geometry == "quotient" and diag_s:
        with pytest.raises(ValueError, match="stella_diag_s: found True with stella_geometry='quotient'"):
            StellaConfig(**settings)
        return
    model = adapted(Mlp(), target_modules=["up", "down"], r=3, stella_grad_scaling=8.0, **settings)
    losses = train(model, 20, lr=0.02)
    assert losses[-1] < 0.95 * losses[0]
    error = max(float(stiefel.orthonormality_error(f.view)) for f in stiefel_factors(model))
    assert error > 1e-6 if geometry == "euclidean" else error < 1e-12


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="stella_geometry: found 'flat', wanted one of 'stiefel'"):
        StellaConfig(stella_geometry="flat")
    with pytest.raises(ValueError, match="init_lora_weights: found 'zeros'"):
        StellaConfig(init_lora_weights="zeros")
    with pytest.raises(ValueError, match="every: found 0"):
        DiagnosticsCallback(every=0)


def test_trainer_with_quotient_geometry_and_diagnostics(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = adapted(llama(layers=1), target_modules=["q_proj", "up_proj"], stella_geometry="quotient")
    ids = tokens(rows=1)[0]
    examples: list[dict[str, Tensor]] = [{"input_ids": ids, "labels": ids}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        weight_decay=0.1,
    )
    callback = DiagnosticsCallback(every=2, plot=tmp_path / "training.png")
    trainer = StellaTrainer(model=model, args=arguments, train_dataset=examples, callbacks=[callback])
    trainer.train()
    assert callback.recorder is not None
    history = callback.recorder.history
    assert [record.step for record in history] == [0, 2, 4, 5]
    assert max(max(record.orthonormality.values()) for record in history) < 2e-5
    assert max(float(a.max()) for a in history[0].angles.values()) < 1e-6
    assert min(float(a.max()) for a in history[-1].angles.values()) > 1e-4
    assert (tmp_path / "training.png").stat().st_size > 5000

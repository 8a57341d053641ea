"""Whole PEFT models: compiled with dynamic shapes, exported, and with the library's own gradient checkpointing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from torch import Tensor, nn

from stella_kernels.peft import StellaConfig
from tests.peft.models import SAME_LOGITS, adapted, difference, llama, logits, stella_layers, stir, tokens


def loss_and_gradients(model: nn.Module, run: nn.Module, ids: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    loss = run(input_ids=ids, labels=ids).loss
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.whole), 0.2])
def test_compiled_with_dynamic_shapes(dropout: float) -> None:
    torch._dynamo.reset()
    model = stir(adapted(llama(), lora_dropout=dropout)).train()
    model.add_adapter("second", StellaConfig(r=2, lora_dropout=0.4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, length in ((2, 5), (3, 9)):
        ids = tokens(rows, length)
        found, wanted = loss_and_gradients(model, compiled, ids), loss_and_gradients(model, model, ids)
        for a, b in zip(found, wanted, strict=True):
            assert difference(a.detach(), b.detach()) < SAME_LOGITS
    # a scale that was changed is seen
    compiled.eval()
    for layer in stella_layers(model).values():
        layer.set_scale("default", 0.25)
    ids = tokens()
    assert difference(logits(compiled, ids), logits(model, ids)) < SAME_LOGITS


@pytest.mark.parametrize("merged", [False, True])
def test_export(merged: bool) -> None:
    model = stir(adapted(llama()))
    wanted = model.merge_and_unload() if merged else model

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = wanted

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(Logits(), (tokens(2, 6),), dynamic_shapes={"ids": {0: batch}})
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("stella_kernels" in name for name in operators) is not merged
    ids = tokens(5, 6)
    assert difference(program.module()(ids).detach(), logits(wanted, ids)) < SAME_LOGITS


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_bitwise_plain(use_reentrant: bool) -> None:
    model = stir(adapted(llama(), lora_dropout=0.2)).train()
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, runs = tokens(2, 9), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        runs.append([p.grad for p in trained])
    for plain, recomputed in zip(*runs, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)

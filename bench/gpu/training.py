"""The training steps that the stages time: SmolLM2-135M's shape with LoRA or StelLA, eager, compiled or as a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.adapter.llama import Llama, replace_projections
from bench.adapter.lora import lora
from bench.common.device import as_trained
from bench.gpu.features import Graph
from bench.gpu.rehearsal import TOY_MODEL
from bench.gpu.setting import importable
from stella_kernels import StellaLinear
from stella_kernels.optim import StellaAdamW

RANK = 16
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
MODES = ("eager", "compiled", "graph")
ADAPTERS = ("lora", "ours")


@dataclass(frozen=True)
class Problem:
    """What is trained: on so many sequences of tokens, frozen weights of this dtype."""

    device: torch.device
    sequences: int
    tokens: int
    dtype: torch.dtype
    toy: bool

    @property
    def shape(self) -> dict[str, Any]:
        return TOY_MODEL if self.toy else SHAPE

    @property
    def rank(self) -> int:
        return 4 if self.toy else RANK


def problem_on(device: torch.device, toy: bool) -> Problem:
    """A batch that the device has memory for, with LoRA's activations and ours kept by a graph each."""
    if toy:
        return Problem(device, 2, 5, torch.float32, True)
    small = torch.cuda.get_device_properties(device).total_memory < 40 * 2**30
    return Problem(device, 4 if small else 16, 512, torch.bfloat16, False)


def libraries() -> str:
    """Why the model is one of plain torch, or nothing where it is that of transformers with adapters of PEFT."""
    return importable("transformers") or importable("peft")


def build(name: str, dropout: float, problem: Problem) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with its adapters, and their optimizer."""
    torch.manual_seed(0)
    r = problem.rank
    if libraries():
        base: nn.Module = Llama(problem.shape, problem.tokens).to(problem.device, problem.dtype)
        kinds: dict[str, Callable[[nn.Linear], nn.Module]] = {
            "lora": lambda linear: lora(linear, r, dropout),
            "ours": lambda linear: StellaLinear(linear, r=r, dropout=dropout),
        }
        model = replace_projections(base, kinds[name])
    else:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        from stella_kernels.peft import StellaConfig

        base = LlamaForCausalLM(LlamaConfig(**problem.shape)).requires_grad_(False)
        settings = {"lora": LoraConfig, "ours": StellaConfig}[name](
            r=r, lora_alpha=r, lora_dropout=dropout, target_modules=r".*_proj"
        )
        model = get_peft_model(base.to(problem.device, problem.dtype), settings)
    if name == "ours":
        width = float(problem.shape["hidden_size"])
        return model.train(), StellaAdamW(model, lr=1e-3, weight_decay=0.0, grad_scaling=width)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)


def training_step(name: str, mode: str, dropout: float, problem: Problem) -> Callable[[], object]:
    """One step. As a graph, forward and backward are its, and the optimizer is called eagerly, for all alike."""
    model, optimizer = build(name, dropout, problem)
    generator, words = torch.Generator().manual_seed(1), problem.shape["vocab_size"]
    size = (problem.sequences, problem.tokens)
    tokens = torch.randint(words, size, generator=generator).to(problem.device)
    answers = torch.randint(words, size[:1], generator=generator).to(problem.device)
    plain = isinstance(model, Llama)

    def loss_of(tokens: Tensor, answers: Tensor) -> Tensor:
        with as_trained(problem.device, problem.dtype):
            if plain:
                return cross_entropy(model(tokens), answers)
            return cross_entropy(model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1], answers)

    if mode == "compiled":  # layer by layer, which all share one compilation; of a CPU that would take a minute
        for layers in [m for name, m in model.named_modules() if name.split(".")[-1] == "layers"]:
            for layer in layers.children():
                layer.compile(backend="inductor" if problem.device.type == "cuda" else "eager")
    keep = mode == "graph"

    def both() -> None:
        if keep:
            optimizer.zero_grad(set_to_none=False)
        loss_of(tokens, answers).backward()

    run: Callable[[], object] = Graph(problem.device, both).replay if keep else both

    def step() -> None:
        run()
        optimizer.step()
        if not keep:
            optimizer.zero_grad()

    return step

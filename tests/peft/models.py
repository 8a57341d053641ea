"""Tiny randomly initialised models for the PEFT tests, and what equality of their outputs means."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stella_kernels.peft import StellaConfig, StellaLayer

VOCABULARY = 64


def llama(layers: int = 2, dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    """n = m = 32 in attention's q and o, (32, 16) in k and v, (32, 48) and (48, 32) in the MLP."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).eval()


class Mlp(nn.Module):
    """Two linear layers in float64, so that equality is to 1e-12: up (8 to 24), down (24 to 8), and a head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24, dtype=dtype)
        self.down = nn.Linear(24, 8, dtype=dtype)
        self.head = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def adapted(model: nn.Module, **settings: object) -> nn.Module:
    return get_peft_model(model, StellaConfig(**{"r": 4, "target_modules": "all-linear", **settings})).eval()


def stella_layers(model: nn.Module) -> dict[str, StellaLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StellaLayer)}


@torch.no_grad()
def stir(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Replace every S of an adapter by random numbers, so that no two adapters and no transposes are alike."""
    for layer in stella_layers(model).values():
        if adapter in layer.stella_S:
            layer.stella_S[adapter].weight.normal_()
    return model


@torch.no_grad()
def trained(base: nn.Module, **settings: object) -> nn.Module:
    """A model with an adapter as after training: every factor away from its start."""
    model = stir(adapted(base, **settings))
    for layer in stella_layers(model).values():
        U, _, Vt = layer.factors("default")
        nn.init.orthogonal_(U)
        nn.init.orthogonal_(Vt)
    return model


def tokens(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest entry wanted."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# Two layers of about 10 products each, each off by at most sqrt(48) < 7 roundings, errors of random sign adding as
# sqrt(20): 7 · 4.5 = 32 eps; the norms and the softmax may amplify that a few times. 256 eps = 3e-5.
SAME_LOGITS = 256 * torch.finfo(torch.float32).eps


def orthonormality(model: nn.Module, adapter: str = "default") -> float:
    """The largest ‖QᵀQ − I‖ over the U and V of an adapter."""
    worst = 0.0
    for layer in stella_layers(model).values():
        U, _, Vt = (weight.detach().double() for weight in layer.factors(adapter))
        for gram in (U.mT @ U, Vt @ Vt.mT):
            worst = max(worst, float((gram - torch.eye(len(gram), dtype=gram.dtype)).norm()))
    return worst


def check_dropped_out_in_training_only(model: nn.Module, x: Tensor) -> None:
    """Of a model in evaluation, which is left in training."""
    still = model(x).detach()
    assert torch.equal(model(x), still)
    model.train()
    draws = torch.stack([model(x).detach() for _ in range(64)])
    assert not torch.equal(draws[0], draws[1])
    # the mean of 64 draws is the undropped output within 6 standard errors, everywhere
    assert bool(((draws.mean(0) - still).abs() <= 6 * draws.std(0) / 8).all())

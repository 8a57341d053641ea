"""A Llama in plain torch, for where transformers is not: the same linear layers, shapes and operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.heads, self.shared = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        self.head = width // self.heads
        narrow = self.shared * self.head
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, c["intermediate_size"], bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c["intermediate_size"], width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.before(x)
        q = self.q_proj(h).unflatten(-1, (self.heads, self.head)).transpose(1, 2)
        k, v = (p(h).unflatten(-1, (self.shared, self.head)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        repeat = self.heads // self.shared
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
        attended = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(-2))
        h = self.between(x)
        return x + self.down_proj(silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """Logits of the last token."""

    def __init__(self, c: Mapping[str, Any], longest: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"])
        head = c["hidden_size"] // c["num_attention_heads"]
        angles = torch.outer(torch.arange(longest), 1e4 ** (-torch.arange(0, head, 2) / head)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        length = tokens.shape[1]
        cos, sin = (table[:length].to(x.dtype) for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x[:, -1]) @ self.embed.weight.mT


def replace_projections(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with each of its projections put through ``make``; all else is frozen."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("_proj") and isinstance(child, nn.Linear):
                setattr(module, name, make(child))
    return model

"""Base layers that are not linear, an input for each, a model of several, and what the adapted ones have to compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stella_kernels.peft import StellaLayer
from tests.peft.models import adapted, stella_layers, stir

# An entry of an output sums n products, n <= 64, and the adapter's part another n, and r: at most 2 n + r < 140
# roundings of eps / 2, of terms up to sqrt(n) = 8 times the largest sum. 140 · 8 · 1.1e-16 = 1.2e-13, and as errors of
# random sign add as roots, a tenth of it is seen.
EXACT = 2e-13


class Scaled(nn.Embedding):
    """As the embeddings of Bart (a float) and Gemma (a tensor) in transformers."""

    def __init__(self, n: int, m: int, padding_idx: int | None, embed_scale: float | Tensor) -> None:
        super().__init__(n, m, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.embed_scale
        return super().forward(ids) * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)


# by name: how to make the base layer, and the shape of an input; of an embedding, of its ids
BASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "embedding": (lambda: nn.Embedding(13, 7), (3, 5)),
    "embedding, padding": (lambda: nn.Embedding(13, 7, padding_idx=2), (3, 5)),
    "embedding, one id": (lambda: nn.Embedding(5, 9), ()),
    "embedding, sparse": (lambda: nn.Embedding(13, 7, sparse=True), (3, 5)),
    "embedding, scaled by a float": (lambda: Scaled(13, 7, None, 3.3), (3, 5)),
    "embedding, scaled by a tensor": (lambda: Scaled(13, 7, 0, torch.tensor(3.3)), (3, 5)),
    "1d": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 11)),
    "1d, stride": (lambda: nn.Conv1d(4, 6, 4, stride=3, padding=2, bias=False), (2, 4, 11)),
    "1d, same": (lambda: nn.Conv1d(3, 5, 3, padding="same", dilation=2), (2, 3, 11)),
    "1d, circular": (lambda: nn.Conv1d(3, 5, 3, padding=2, padding_mode="circular"), (2, 3, 11)),
    "1d, no batch": (lambda: nn.Conv1d(3, 5, 3), (3, 11)),
    "2d": (lambda: nn.Conv2d(3, 7, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 5)),
    "2d, dilation": (lambda: nn.Conv2d(2, 5, 3, dilation=(1, 2), padding=(0, 1)), (2, 2, 7, 6)),
    "2d, reflect": (lambda: nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect"), (2, 2, 7, 6)),
    "2d, one by one": (lambda: nn.Conv2d(9, 5, 1), (2, 9, 3, 4)),
    "3d": (lambda: nn.Conv3d(2, 5, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 3, 5, 4)),
}


def base_and_input(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """The base layer in ``dtype``, and an input: ids, or numbers in ``dtype``."""
    make, shape = BASES[name]
    base = make().to(dtype)
    if isinstance(base, nn.Embedding):
        return base, torch.randint(0, base.num_embeddings, shape) if shape else torch.tensor(1)
    return base, torch.randn(shape, dtype=dtype)


def one_layer(base: nn.Module, **settings: object) -> tuple[nn.Module, StellaLayer]:
    """A model of the single layer ``base``, adapted with a random S, and the adapted layer."""
    model = stir(adapted(nn.Sequential(base), **{"r": 3, "target_modules": ["0"], **settings}))
    return model, stella_layers(model)["base_model.model.0"]


def update(layer: StellaLayer, adapter: str = "default") -> Tensor:
    """``s (U S Vᵀ − U0 V0ᵀ)``, (m, n), differentiable."""
    U, S, Vt = layer.factors(adapter)
    product = U @ (torch.diag(S) if S.dim() == 1 else S) @ Vt
    if (start := layer.start(adapter)) is not None:
        product = product - start[0] @ start[1]
    return layer.scaling[adapter] * product


def dense(base: Any, x: Tensor, *updates: Tensor) -> Tensor:
    """What ``base`` computes of ``x`` with the updates (m, n) added to its weight, differentiable in them."""
    weight, base = base.weight, copy.copy(base)
    if isinstance(base, nn.Embedding):
        base.sparse = False  # of a sparse gradient torch has no transpose
    for each in updates:
        weight = weight + (each.mT if isinstance(base, nn.Embedding) else each.reshape(weight.shape))
    return functional_call(base, {"weight": weight}, (x,))


class Reader(nn.Module):
    """Ids of words and a picture to two vectors, by an embedding, convolutions and a linear layer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0, dtype=dtype)
        self.along = nn.Conv1d(6, 5, 3, padding=1, dtype=dtype)
        self.picture = nn.Conv2d(3, 8, 3, stride=2, padding=1, dtype=dtype)
        self.head = nn.Linear(13, 4, dtype=dtype)

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        read = torch.tanh(self.along(self.words(ids).mT)).mean(-1)  # (B, 5)
        seen = torch.tanh(self.picture(picture)).mean((-1, -2))  # (B, 8)
        return self.head(torch.cat([read, seen], -1))


TARGETS = ["words", "along", "picture", "head"]


def sentences(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Ids (4, 7), padding among them, and pictures (4, 3, 9, 9)."""
    ids = torch.randint(1, 11, (4, 7))
    ids[:, -2:] = 0
    return ids, torch.randn(4, 3, 9, 9, dtype=dtype)


@torch.no_grad()
def merged_by_hand(model: nn.Module, base: nn.Module, adapter: str = "default") -> nn.Module:
    """A copy of ``base`` with the update of every layer of ``model`` added to its weight."""
    base = copy.deepcopy(base)
    for name, layer in stella_layers(model).items():
        if adapter in layer.r:
            target: Any = base.get_submodule(name.removeprefix("base_model.model."))
            added = update(layer, adapter)
            target.weight += added.mT if isinstance(target, nn.Embedding) else added.reshape(target.weight.shape)
    return base

"""Layers that take no adapter, or one that cannot be merged: an error that names layer, reason and cure."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

pytest.importorskip("peft")

from torch import Tensor, nn

from tests.peft.layers.bases import EXACT, Scaled, update
from tests.peft.models import adapted, difference, stella_layers, stir


class OfItsOwn(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(super().forward(ids))


class Convolved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: nn.Embedding(9, 4, max_norm=1.0), r"'0' has max_norm=1\.0, wanted None"),
        (lambda: OfItsOwn(9, 4), r"'0' is a OfItsOwn with a forward of its own, wanted that of nn\.Embedding"),
        (lambda: Scaled(9, 4, None, torch.ones(4)), r"'0' is a Scaled with a forward of its own"),
        (lambda: nn.EmbeddingBag(9, 4), r"'0' is a EmbeddingBag, wanted a linear layer .*nn\.Embedding, or nn\.Conv1d"),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), r"'0' has groups=2, wanted 1"),
        (lambda: nn.ConvTranspose2d(4, 6, 3), r"'0' is a ConvTranspose2d, wanted a linear layer"),
        (lambda: Convolved(4, 6, 3), r"'0' is a Convolved with a forward of its own, wanted that of nn\.Conv1d"),
        (lambda: Standardised(4, 6, 3), r"'0' is a Standardised with a forward of its own, wanted that of nn\.Conv1d"),
    ],
)
@pytest.mark.parametrize("others", [[], ["1"]])
def test_what_an_adapter_would_not_heed_is_refused_and_nothing_replaced(base, message, others):
    model = nn.Sequential(base(), nn.Linear(4, 4))
    before = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=rf"^target_modules: {message}.*; leave it out, by target_modules"):
        adapted(model, r=2, target_modules=["0", *others])
    assert list(map(type, model.modules())) == before


def test_a_weight_computed_from_others_takes_adapters_and_refuses_to_merge():
    base = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 5, 3))
    model = stir(adapted(nn.Sequential(OrderedDict(conv=base)), r=3, target_modules=["conv"]))
    (layer,) = stella_layers(model).values()
    x = torch.randn(2, 3, 7)
    wanted = base(x) + nn.functional.conv1d(x, update(layer).reshape(5, 3, 3))
    # EXACT in the other dtype
    assert difference(model(x).detach(), wanted.detach()) < EXACT * 2**29
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"^merge: found a base weight that is computed anew from others"):
            merge()
    assert difference(model(x).detach(), wanted.detach()) < EXACT * 2**29

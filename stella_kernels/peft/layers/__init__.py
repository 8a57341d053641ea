"""The layers that PEFT calls: one module a kind of base layer, and what they have in common."""

from __future__ import annotations

from torch import nn

from ..base_layer import CONVOLUTIONS
from .adapted import AdaptedLayer
from .convolution import Conv
from .embedding import Embedding
from .linear import Linear


def layer_class(base: nn.Module) -> type[AdaptedLayer]:
    """The StelLA layer that takes ``base``, which ``base_layer.why_unfit`` has nothing against."""
    if isinstance(base, nn.Embedding):
        return Embedding
    return Conv if isinstance(base, CONVOLUTIONS) else Linear


__all__ = ["AdaptedLayer", "Conv", "Embedding", "Linear", "layer_class"]

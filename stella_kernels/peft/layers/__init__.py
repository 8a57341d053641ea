"""The layers that PEFT calls: one module a kind of base layer, and what they have in common."""

from __future__ import annotations

from torch import nn

from ..factor import is_convolution
from .adapted import AdaptedLayer
from .convolution import Conv
from .embedding import Embedding
from .linear import Linear


def layer_class(base: nn.Module) -> type[AdaptedLayer]:
    """The StelLA layer that takes ``base``, which ``factor.why_unfit`` has nothing against."""
    if isinstance(base, nn.Embedding):
        return Embedding
    return Conv if is_convolution(base) else Linear


__all__ = ["AdaptedLayer", "Conv", "Embedding", "Linear", "layer_class"]

"""The linear layer with StelLA adapters, by the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ... import functional
from ...nn import Term, adapted_output, is_untouched
from .adapted import AdaptedLayer


class Linear(AdaptedLayer):
    """A linear layer (``nn.Linear``, ``Conv1D``, or quantized), (..., n) to (..., m), with StelLA adapters."""

    def _adapted(self, x: Tensor, terms: Sequence[Term], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        return adapted_output(self.base_layer, x, terms, self._owns_output(), args=args, kwargs=kwargs)

    def _plus(self, y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
        for term in terms:
            y = functional.stella_adapter(y, x, *term)
        return y

    def _owns_output(self) -> bool:
        """Whether what the base layer returns is nobody else's, so that the adapter may be added to it in place.

        A hook may keep the output, and autograd forbids writing to views that some quantized layers and backward hooks
        return.
        """
        return type(self.base_layer) in (nn.Linear, Conv1D, Linear) and is_untouched(self.base_layer)

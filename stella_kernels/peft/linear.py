"""The linear layer with StelLA adapters, as PEFT calls it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import functional
from ..nn import Term, adapted_output, is_untouched, start_term
from ..nn.masters import start_fits
from .config import StellaConfig
from .merging import MergingLayer


class Linear(nn.Module, MergingLayer):
    """A linear layer (``nn.Linear``, ``Conv1D``, or quantized) with StelLA adapters.

    Args:
        base_layer: the layer to adapt, (..., n) to (..., m).
        adapter_name: the name of the first adapter.
        config: its configuration.
        r: its rank.
        lora_alpha: its scale, divided by r (or sqrt(r)).
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: StellaConfig, r: int, lora_alpha: float
    ) -> None:
        super().__init__()
        MergingLayer.__init__(self, base_layer, config.fan_in_fan_out)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output, (..., n) to (..., m), plus that of every active adapter.

        ``adapter_names`` names instead an adapter for each row of the batch (``'__base__'``: none); inference only.

        Raises:
            ValueError: ``adapter_names`` is not as long as the batch, or adapters are merged.
        """
        if self.seen is not None:
            self.seen.called = True
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._present(self.active_adapters)
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        terms = [term for adapter in active for term in self._terms(adapter)]
        return adapted_output(self.base_layer, x, terms, self._owns_output(), args=args, kwargs=kwargs)

    def _owns_output(self) -> bool:
        """Whether what the base layer returns is nobody else's, so that the adapter may be added to it in place.

        A hook may keep the output, and autograd forbids writing to views that some quantized layers and backward hooks
        return.
        """
        return type(self.base_layer) in (nn.Linear, Conv1D, Linear) and is_untouched(self.base_layer)

    def _terms(self, adapter: str) -> Iterator[Term]:
        """The adapter, and what is taken away of one that starts as 'pseudo_zero'."""
        scale, p = self.scaling[adapter], self.lora_dropout[adapter] if self.training else 0.0
        yield (*self.factors(adapter), scale, p)
        if (start := self.start(adapter)) is not None:
            yield start_term(*start, scale)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names: found {len(adapter_names)} names for a batch of {len(x)}, wanted one a row."
            )
        if self.merged:
            raise ValueError("adapter_names: some adapters are merged; call unmerge_adapter() first.")
        y = self.base_layer(x, *args, **kwargs)
        for adapter in self._present(sorted(set(adapter_names))):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
            part, rows_of_x = y[rows], x[rows]  # copies: each term may be added in place
            for term in self._terms(adapter):
                part = functional.stella_adapter(part, rows_of_x, *term)
            y = y.index_copy(0, rows, part)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the state dict decides which adapters subtract a start: the option that the factors began with no longer does
        error_msgs: list[str] = args[-1]
        for adapter in list(self.stella_U):
            keys = [f"{prefix}{kind}.{adapter}.weight" for kind in ("stella_U0", "stella_Vt0")]
            stored = [key for key in keys if key in state_dict]
            if len(stored) == 1:
                error_msgs.append(f"{stored[0]}: found without its partner, wanted both of {keys} or neither.")
            elif stored and adapter not in self.stella_U0:
                U, _, Vt = self.factors(adapter)
                if start_fits(state_dict, dict(zip(keys, (U, Vt), strict=True)), error_msgs):
                    self._have_start(adapter, True)
            elif not stored and f"{prefix}stella_U.{adapter}.weight" in state_dict:
                self._have_start(adapter, False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT can turn the adapter into a LoRA: it adds ``get_delta_weight``."""
        return True

    def __repr__(self) -> str:
        return "stella." + super().__repr__()

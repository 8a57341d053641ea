"""What every StelLA layer does when it is called and loaded, whatever its base layer computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import Term, start_term
from ...nn.masters import start_fits
from ..config import StellaConfig
from ..merging import MergingLayer


class AdaptedLayer(nn.Module, MergingLayer):
    """A base layer with StelLA adapters. A subclass says how an adapter's output comes about: ``_plus``.

    Args:
        base_layer: the layer to adapt.
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
        """The base layer's output plus that of every active adapter.

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
        return self._adapted(x, [term for adapter in active for term in self._terms(adapter)], args, kwargs)

    def _adapted(self, x: Tensor, terms: Sequence[Term], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        return self._plus(self.base_layer(x, *args, **kwargs), x, terms)

    def _plus(self, y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
        """``y``, an output of the base layer, plus what the terms add for the input ``x``, in the dtype of ``y``.

        Whoever calls it leaves ``y`` to it, also its memory.
        """
        raise NotImplementedError

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
            y = y.index_copy(0, rows, self._plus(y[rows], x[rows], list(self._terms(adapter))))
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
        """PEFT's own conversion writes the matrices of linear layers only; ours (``save_as_lora``) the others' too."""
        return self.kind is None

    def __repr__(self) -> str:
        return "stella." + super().__repr__()


def left_product(U: Tensor, S: Tensor, scale: float) -> Tensor:
    """``s · U S`` (m, r), in the factors' dtype; S (r, r) or (r,)."""
    return (U * S if S.dim() == 1 else U @ S) * scale

"""The layers of a model that have an adapter."""

from __future__ import annotations

from torch import nn

from .layer import StellaLayer


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, StellaLayer]:
    """The StelLA layers of ``model`` that have the adapter, by name.

    Raises:
        TypeError: the model has no StelLA layer.
        ValueError: no layer has the adapter, or its factors are on the meta device.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, StellaLayer)}
    if not every:
        raise TypeError(f"model: found no StelLA layer in {type(model).__name__}, wanted get_peft_model(model, ...).")
    found = {name: layer for name, layer in every.items() if adapter_name in layer.stella_U}
    if not found:
        known = sorted({adapter for layer in every.values() for adapter in layer.stella_U})
        raise ValueError(f"adapter_name: found {adapter_name!r}, wanted one of {known}.")
    for name, layer in found.items():
        if any(factor.is_meta for factor in layer.factors(adapter_name)):
            raise ValueError(f"{name}: found factors on the meta device, wanted loaded ones; load the adapter first.")
    return found

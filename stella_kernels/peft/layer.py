"""The PEFT layer: an opaque base layer and, for each adapter, the factors ``U``, ``S`` and ``Vᵀ``.

The base layer may be anything that maps (..., n) to (..., m), quantized or itself a tuner layer: only its output is
used; or an embedding, or a convolution, whose weight is a matrix as well. Orientation is explicit: ``U`` is stored
(m, r) and ``Vᵀ`` (r, n), so a square layer or factor is not ambiguous.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn import OwnFactor, init_factors
from ..reference.autocast import without_autocast
from .base_layer import largest_rank, layer_features, layer_kind
from .config import StellaConfig
from .factor import Factor, base_device_and_dtype, master_dtype


class Seen:
    """What happened to a layer in a forward pass that is watched, see ``targets.watched``."""

    called = False
    weight_read = False


class StellaLayer(BaseTunerLayer):
    """What every StelLA layer holds: factors and settings by adapter name. Mixed into an ``nn.Module``."""

    adapter_layer_names = ("stella_U", "stella_S", "stella_Vt")
    # PEFT's switch against casting a layer's input to its weight's dtype; here nothing is cast, on or off
    cast_input_dtype_enabled = True
    seen: Seen | None = None
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "stella_U0", "stella_Vt0")

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False) -> None:
        self.base_layer = base_layer
        base = self.get_base_layer()
        features = layer_features(base)
        if features is None:
            raise TypeError(
                f"base_layer: found {type(base).__name__}, wanted a linear layer (in_features, out_features), an "
                "embedding or a convolution."
            )
        self.in_features, self.out_features = features
        self.kind = layer_kind(base)  # None for a linear layer
        # nn.Linear stores (m, n), Conv1D and embeddings (n, m), whatever was configured; others say how by the
        # configuration
        known = isinstance(base, nn.Linear) or self.kind is not None
        self.fan_in_fan_out = isinstance(base, Conv1D | nn.Embedding) or (fan_in_fan_out and not known)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.stella_U = nn.ModuleDict()
        self.stella_S = nn.ModuleDict()
        self.stella_Vt = nn.ModuleDict()
        self.stella_U0 = nn.ModuleDict()  # of adapters that start as 'pseudo_zero'
        self.stella_Vt0 = nn.ModuleDict()
        # by adapter, what stays frozen when the adapter is trained; PEFT 0.21 asks for it under this name
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: StellaConfig, r: int, lora_alpha: float) -> None:
        """Add (or replace) the adapter ``adapter_name`` of rank ``r``: U (m, r), S (r, r) or (r,), Vᵀ (r, n), float32.

        Raises:
            ValueError: ``r`` is larger than the smaller of m and n: there is no U or V with r orthonormal columns.
        """
        m, n = self.out_features, self.in_features
        most = largest_rank(self.get_base_layer(), n, m)
        if not 1 <= r <= most:
            raise ValueError(f"r: found {r} for a layer of {n} inputs and {m} outputs, wanted 1 <= r <= {most}.")
        device, base_dtype = base_device_and_dtype(self.get_base_layer())
        dtype = master_dtype(base_dtype)
        if device is not None and device.type == "meta":
            device = None  # weights offloaded or not yet loaded: the factors are real, unless the caller says otherwise
        U = Factor((m, r), dtype, device, "columns")
        S = Factor((r,) if config.stella_diag_s else (r, r), dtype, device)
        Vt = Factor((r, n), dtype, device, "rows")
        self._initialise(U.weight, S.weight, Vt.weight, config.init_lora_weights)
        self.stella_U[adapter_name], self.stella_S[adapter_name], self.stella_Vt[adapter_name] = U, S, Vt
        self._have_start(adapter_name, config.init_lora_weights == "pseudo_zero")
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = config.lora_dropout
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = self._configured_scaling(adapter_name)
        self.frozen_peft_weight_names[adapter_name] = (
            ("stella_U", "stella_Vt") if config.stella_frozen_subspaces else ()
        )
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; of an adapter with frozen subspaces S alone is trained."""
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_subspaces()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """As PEFT's; of an adapter with frozen subspaces S alone is trained."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_subspaces()

    def _freeze_subspaces(self) -> None:
        for adapter, kinds in self.frozen_peft_weight_names.items():
            for kind in kinds:
                if adapter in (factors := getattr(self, kind)):
                    factors[adapter].requires_grad_(False)

    def _have_start(self, adapter: str, wanted: bool) -> None:
        """Keep a copy of U and Vᵀ as they are now, as the start to subtract, or have no start."""
        for starts, factors in ((self.stella_U0, self.stella_U), (self.stella_Vt0, self.stella_Vt)):
            if wanted:
                # a frozen parameter, not a buffer: while loading, PEFT looks for meta tensors among parameters only
                starts[adapter] = copy.deepcopy(factors[adapter]).requires_grad_(False)
            elif adapter in starts:
                del starts[adapter]

    def _initialise(self, U: Tensor, S: Tensor, Vt: Tensor, init: bool | str) -> None:
        if U.device.type == "meta":
            return  # to be filled from a checkpoint
        name = ("rando" if init else "identity") if isinstance(init, bool) else init
        if not name.startswith("svd"):
            init_factors(U, S, Vt, name)
        else:
            base: Any = self.get_base_layer()
            with gather_params_ctx(base.weight):
                weight = self._as_matrix(dequantize_module_weight(base).detach().to(U.device))
                init_factors(U, S, Vt, name, weight, self.fan_in_fan_out)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as the matrix whose singular vectors an adapter may start from, (m, n) or (n, m)."""
        return weight

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """U (m, r), S (r, r) or (r,), Vᵀ (r, n) of an adapter of this layer."""
        U, S, Vt = (cast(Factor, kind[adapter]).weight for kind in (self.stella_U, self.stella_S, self.stella_Vt))
        return U, S, Vt

    @torch.no_grad()
    def replace_factors(self, adapter: str, U: Tensor, S: Tensor, Vt: Tensor, lora_alpha: float) -> None:
        """Give an adapter other factors, of another rank too: the same parameters, in their dtypes, where they are.

        Its start, if it has one, is no longer subtracted; a scale that was set stays set.
        """
        configured = self._configured_scaling(adapter)
        share = self.scaling[adapter] / configured if configured else 1.0
        for parameter, value in zip(self.factors(adapter), (U, S, Vt), strict=True):
            parameter.grad = None  # of the old shape
            parameter.data = value.to(parameter.device, parameter.dtype).contiguous()
        self._have_start(adapter, False)
        self.r[adapter], self.lora_alpha[adapter] = U.shape[1], lora_alpha
        self.scaling[adapter] = share * self._configured_scaling(adapter)

    def start(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """U0 (m, r) and V0ᵀ (r, n), the start that a 'pseudo_zero' adapter subtracts; None for any other."""
        if adapter not in self.stella_U0:
            return None
        return cast(Factor, self.stella_U0[adapter]).weight, cast(Factor, self.stella_Vt0[adapter]).weight

    def own_stiefel_factors(self) -> Iterator[OwnFactor]:
        """The trainable ``U`` and ``Vᵀ`` of the active adapters, as ``nn.stiefel_factors`` collects them."""
        for adapter in self._present(self.active_adapters):
            yield from (own for own in self._factors_of(adapter) if own[1].requires_grad)

    def every_stiefel_factor(self) -> Iterator[OwnFactor]:
        """``U`` and ``Vᵀ`` of every adapter, trained or not."""
        for adapter in self.stella_U:
            yield from self._factors_of(adapter)

    def _factors_of(self, adapter: str) -> Iterator[OwnFactor]:
        U, S, Vt = self.factors(adapter)
        yield f"stella_U.{adapter}.weight", U, False, S, "left", self._master(self.stella_U, adapter)
        yield f"stella_Vt.{adapter}.weight", Vt, True, S, "right", self._master(self.stella_Vt, adapter)

    @staticmethod
    def _master(factors: nn.ModuleDict, adapter: str) -> torch.dtype:
        return cast(Factor, factors[adapter]).master

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as in every PEFT layer: models look at its dtype and device."""
        if self.seen is not None:
            self.seen.weight_read = True
        return super().weight

    def adds_adapters(self) -> bool:
        """Whether a forward pass computes adapters: some are active here, and not switched off or merged."""
        return not self.disable_adapters and not self.merged and bool(self._present(self.active_adapters))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the base layer's dtype; the factors are full-precision masters
        if device is None:
            device, _ = base_device_and_dtype(self.get_base_layer())
        if device is None or device.type == "meta":
            return
        for attribute in (*self.adapter_layer_names, "stella_U0", "stella_Vt0"):
            factors = getattr(self, attribute)
            if adapter_name in factors and factors[adapter_name].weight.device.type != "meta":
                factors[adapter_name].to(device)

    def _configured_scaling(self, adapter: str) -> float:
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scale to ``scale`` times the configured one; a layer without that adapter is left alone."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._configured_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter by ``scale``."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter by ``scale``; without one, return to the configured scale."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] = (
                self._configured_scaling(adapter) if scale is None else self.scaling[adapter] / scale
            )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s · U S Vᵀ``, less the start of a 'pseudo_zero' adapter, in the base weight's layout, (m, n) or (n, m), in
        the factors' dtype.
        """
        U, S, Vt = self.factors(adapter)
        with without_autocast(U.device):
            US = U * S if S.dim() == 1 else U @ S  # (m, r)
            product = US @ Vt  # (m, n)
            if (start := self.start(adapter)) is not None:
                product = product - start[0] @ start[1]
        delta = product * self.scaling[adapter]
        return delta.mT if self.fan_in_fan_out else delta

    def _present(self, adapters: list[str]) -> list[str]:
        return [name for name in adapters if name in self.stella_U]


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

"""The PEFT layer: an opaque base layer and, for each adapter, the factors ``U``, ``S`` and ``Vᵀ``.

The base layer may be anything that maps (..., n) to (..., m), quantized or itself a tuner layer: only its output is
used. Orientation is explicit: ``U`` is stored (m, r) and ``Vᵀ`` (r, n), so a square layer or factor is not ambiguous.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import functional
from ..nn import OwnFactor, Term, adapted_output, init_factors, is_untouched, start_term
from ..nn.masters import start_fits
from ..reference.autocast import without_autocast
from .config import StellaConfig
from .factor import Factor, base_device_and_dtype, layer_features, master_dtype


class Seen:
    """What happened to a layer in a forward pass that is watched, see ``targets.watched``."""

    called = False
    weight_read = False


class StellaLayer(BaseTunerLayer):
    """What every StelLA layer holds: factors and settings by adapter name. Mixed into an ``nn.Module``."""

    adapter_layer_names = ("stella_U", "stella_S", "stella_Vt")
    seen: Seen | None = None
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "stella_U0", "stella_Vt0")

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False) -> None:
        self.base_layer = base_layer
        base = self.get_base_layer()
        features = layer_features(base)
        if features is None:
            raise TypeError(
                f"base_layer: found {type(base).__name__}, wanted a linear layer (in_features, out_features)."
            )
        self.in_features, self.out_features = features
        # nn.Linear stores (m, n) and Conv1D (n, m), whatever was configured; others say how by the configuration
        self.fan_in_fan_out = isinstance(base, Conv1D) or (fan_in_fan_out and not isinstance(base, nn.Linear))
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
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: StellaConfig, r: int, lora_alpha: float) -> None:
        """Add (or replace) the adapter ``adapter_name`` of rank ``r``: U (m, r), S (r, r) or (r,), Vᵀ (r, n), float32.

        Raises:
            ValueError: ``r`` is larger than the smaller of m and n: there is no U or V with r orthonormal columns.
        """
        m, n = self.out_features, self.in_features
        if not 1 <= r <= min(m, n):
            raise ValueError(f"r: found {r} for a layer of {n} inputs and {m} outputs, wanted 1 <= r <= {min(m, n)}.")
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
        self.set_adapter(self.active_adapters)

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
                weight = dequantize_module_weight(base).detach().to(U.device)
                init_factors(U, S, Vt, name, weight, self.fan_in_fan_out)

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

    def _present(self, adapters: list[str]) -> list[str]:
        return [name for name in adapters if name in self.stella_U]


class Linear(nn.Module, StellaLayer):
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
        StellaLayer.__init__(self, base_layer, config.fan_in_fan_out)
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

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight, summed in full precision and rounded once to the weight's dtype.

        Args:
            safe_merge: check the sum before anything of this layer is changed.
            adapter_names: those to merge; all active ones by default.

        Raises:
            ValueError: with ``safe_merge``, the sum is not finite.
            TypeError: the base weight is quantized.
        """
        adapters = self._present(check_adapters_to_merge(self, adapter_names))
        if not adapters:
            return
        merged = self._merged_weight(adapters, safe_merge)
        self.get_base_layer().weight.data = merged
        self.merged_adapters.extend(adapters)

    @torch.no_grad()
    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, name: str = "this layer"
    ) -> None:
        """Raise what ``merge`` with the same arguments would raise, calling the layer ``name``, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        adapters = [name for name in self._present(names) if name not in self.merged_adapters]
        if adapters and safe_merge:
            self._merged_weight(adapters, True, name)
        elif adapters:
            self._check_mergeable()

    def _merged_weight(self, adapters: list[str], safe_merge: bool, name: str = "this layer") -> Tensor:
        merged = self._base_weight_plus(adapters, 1)
        if safe_merge and not bool(merged.isfinite().all()):
            broken = [a for a in adapters if not bool(self.get_delta_weight(a).isfinite().all())]
            if broken:  # in PEFT's words
                fault = "".join(f" The adapter {adapter} seems to be broken:" for adapter in broken)
                fault += f" its factors in {name} hold NaN or an infinity;"
            elif not bool(self._check_mergeable().isfinite().all()):
                fault = f" The base weight of {name} holds NaN or an infinity;"
            else:
                fault = f" The sum for {name} overflows {merged.dtype}, though all its terms are finite;"
            raise ValueError(f"NaNs detected in the merged weights.{fault} safe_merge has changed nothing.")
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters again: the old base weight up to its own round-off."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        adapters = self._present(self.merged_adapters)
        self.get_base_layer().weight.data = self._base_weight_plus(adapters, -1)
        self.merged_adapters.clear()

    def _check_mergeable(self) -> Tensor:
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight.detach()
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise TypeError(
                f"merge: found a base weight of {weight.dtype}, wanted float32, float64, bfloat16 or float16; "
                "load the base model without quantization to merge into it."
            )
        return weight

    def _base_weight_plus(self, adapters: list[str], sign: int) -> Tensor:
        weight = self._check_mergeable()
        total = weight.to(master_dtype(weight.dtype), copy=True)
        for adapter in adapters:
            total.add_(self.get_delta_weight(adapter).to(weight.device), alpha=sign)
        return total.to(weight.dtype)

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

"""Merging adapters into the base weight, which may be quantized, and taking them out again."""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .factor import master_dtype
from .layer import StellaLayer


def quantization_backend(base: nn.Module, model: nn.Module) -> Any:
    """PEFT's way to read and write the quantized weight of ``base``, a layer of ``model``; None where it has none.

    PEFT 0.21 knows bitsandbytes, HQQ, and torchao where the model's configuration says how to quantize again.
    """
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:
        return None
    options = {}
    try:
        getter = operator.attrgetter("hf_quantizer.quantization_config.get_apply_tensor_subclass")
        options["get_apply_tensor_subclass"] = getter(model)
    except AttributeError:
        pass  # a torchao weight is not to be quantized again then
    try:
        return resolve_quantization_backend(base, **options)
    except ValueError:
        return None


def separate_shared_weights(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Give each layer that is about to be merged a weight of its own where it shares it with another module, and warn.

    Adapters of a tied embedding are none of the head's: added to the weight of both, they would change the head too.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    shared = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MergingLayer) and layer.would_merge(adapter_names) and layer.quantization_backend is None:
            own = f"{name}." if name else ""
            weight = layer.get_base_layer()._parameters.get("weight")
            owner_names = owners.get(id(weight), [])
            others = [other.split(".base_layer")[0] for other in owner_names if not other.startswith(own)]
            if len(others) > 1:
                raise ValueError(
                    f"merge: the weight of {name!r} is also that of {', '.join(map(repr, others))}, wanted it shared "
                    "with one other module at most: no configuration of transformers says which of several are tied, "
                    "and a merged model would load otherwise than it was saved. Nothing was changed; save the adapter "
                    "instead, or give each module a weight of its own first."
                )
            if others:
                shared[name] = (layer, others)
    for name, (layer, others) in shared.items():
        warnings.warn(
            f"merge: the weight of {name!r} is also that of {', '.join(map(repr, others))}, to which its adapter adds "
            "nothing, so the layer is given a copy of its own to merge into (unmerging ties it again). Save a merged "
            "model with tie_word_embeddings=False in its configuration; merge_and_unload sets that.",
            stacklevel=3,
        )
        layer.separate_weight()


def declare_untied(model: Any) -> None:
    """Have the configuration say so where the input and the output embeddings of ``model`` share no weight any more.

    Else a saved model would be tied again when it is loaded.
    """
    if not any(isinstance(layer, MergingLayer) and layer.shared_weight for layer in model.modules()):
        return
    try:
        taken_in, put_out = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return  # no transformers model, or one without embeddings
    if taken_in is None or put_out is None or taken_in.weight is put_out.weight:
        return
    config: Any = getattr(model, "config", None)
    for each in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
        if each is not None and getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False


@dataclass(frozen=True)
class Kept:
    """A quantized base layer before a merge: the module, its weight, attributes of objects, the merged adapters."""

    base_layer: nn.Module
    weight: Any
    attributes: list[tuple[Any, dict[str, Any]]]
    merged: list[str]


class MergingLayer(StellaLayer):
    """A StelLA layer whose adapters can be merged."""

    # the weight shared with another module that the base layer had before it was given its own; in a tuple, so that it
    # is no parameter of this layer
    shared_weight: tuple[nn.Parameter, ...] = ()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight, summed in full precision and rounded once to the weight's dtype.

        A weight quantized by bitsandbytes, HQQ or torchao is dequantized, added to and quantized again.

        Args:
            safe_merge: check the sum before anything of this layer is changed.
            adapter_names: those to merge; all active ones by default.

        Raises:
            ValueError: with ``safe_merge``, the sum is not finite.
            TypeError: the base weight is quantized in a way that cannot be written, or computed from others.
        """
        adapters = self._present(check_adapters_to_merge(self, adapter_names))
        if not adapters:
            return
        self._set_base_weight(self._merged_weight(adapters, safe_merge))
        self.merged_adapters.extend(adapters)

    @torch.no_grad()
    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, name: str = "this layer"
    ) -> None:
        """Raise what ``merge`` with the same arguments would raise, calling the layer ``name``, and change nothing."""
        adapters = self.would_merge(adapter_names)
        if adapters and safe_merge:
            self._merged_weight(adapters, True, name)
        elif adapters:
            self._base_weight()

    def would_merge(self, adapter_names: list[str] | None) -> list[str]:
        """The adapters that ``merge`` of these names (all active ones where None) would add to the base weight."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in self._present(names) if name not in self.merged_adapters]

    @torch.no_grad()
    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Subtract merged adapters again, all by default: the old base weight up to its own round-off."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names = list(self.merged_adapters) if adapter_names is None else adapter_names
        self._set_base_weight(self._base_weight_plus(self._present(names), -1))
        self.merged_adapters = [name for name in self.merged_adapters if name not in names]
        self.share_weight_again()

    @torch.no_grad()
    def separate_weight(self) -> None:
        """Give the base layer a copy of its weight, and keep the one that it shares with another module."""
        base: Any = self.get_base_layer()
        self.shared_weight = (base.weight,)
        base.weight = nn.Parameter(base.weight.detach().clone(), base.weight.requires_grad)

    def share_weight_again(self) -> None:
        """Undo ``separate_weight`` where no adapter is merged any more."""
        if self.shared_weight and not self.merged:
            base: Any = self.get_base_layer()
            (shared,) = self.shared_weight
            if not (shared.is_meta or base.weight.is_meta):  # else it is offloaded, and its hooks bring it back
                shared.data = shared.detach().to(base.weight)  # where all that shared it were moved or cast meanwhile
            base.weight, self.shared_weight = shared, ()

    def kept_base(self) -> Kept | None:
        """What ``put_back`` needs to undo a merge exactly where the weight is quantized; else None: see ``unmerge``."""
        if self.quantization_backend is None:
            return None
        base: Any = self.get_base_layer()
        # bitsandbytes marks the old weight while it makes a new one, and keeps 8-bit codes beside it
        objects = [one for one in (base.weight, getattr(base, "state", None)) if one is not None]
        return Kept(self.base_layer, base.weight, [(one, dict(vars(one))) for one in objects], [*self.merged_adapters])

    def put_back(self, kept: Kept) -> None:
        """The base layer, its quantized weight and the list of merged adapters as ``kept_base`` found them."""
        self.base_layer, self.merged_adapters = kept.base_layer, kept.merged
        for one, attributes in kept.attributes:
            vars(one).update(attributes)
        base: Any = self.get_base_layer()
        base.__dict__.pop("weight", None)
        base.weight = kept.weight

    def _merged_weight(self, adapters: list[str], safe_merge: bool, name: str = "this layer") -> Tensor:
        merged = self._base_weight_plus(adapters, 1)
        if safe_merge and not bool(merged.isfinite().all()):
            broken = [a for a in adapters if not bool(self.get_delta_weight(a).isfinite().all())]
            if broken:  # in PEFT's words
                fault = "".join(f" The adapter {adapter} seems to be broken:" for adapter in broken)
                fault += f" its factors in {name} hold NaN or an infinity;"
            elif not bool(self._base_weight().isfinite().all()):
                fault = f" The base weight of {name} holds NaN or an infinity;"
            else:
                fault = f" The sum for {name} overflows {merged.dtype}, though all its terms are finite;"
            raise ValueError(f"NaNs detected in the merged weights.{fault} safe_merge has changed nothing.")
        return merged

    def _base_weight(self) -> Tensor:
        """The base weight, dequantized."""
        base: Any = self.get_base_layer()
        if self.quantization_backend is not None:
            if not self.quantization_backend.supports_merge:
                raise TypeError(
                    f"merge: found a base weight of {self.quantization_backend.backend_name}, which cannot be written; "
                    "load the base model without quantization to merge into it."
                )
            weight: Tensor = self.quantization_backend.get_base_weight(base)
            return weight.detach()
        if is_parametrized(base, "weight") or any(f"weight_{part}" in base._parameters for part in ("g", "orig")):
            raise TypeError(
                "merge: found a base weight that is computed anew from others (weight_norm, spectral_norm, pruning), "
                "which would lose the sum; make it a plain one first, as torch.nn.utils.parametrize."
                "remove_parametrizations does."
            )
        weight = base.weight.detach()
        # a subclass, as torchao's, may call itself a float and be none
        if type(weight) is not Tensor or not weight.is_floating_point() or weight.element_size() == 1:
            kind = "" if type(weight) is Tensor else f"{type(weight).__name__}, "
            raise TypeError(
                f"merge: found a base weight of {kind}{weight.dtype}, wanted float32, float64, bfloat16 or float16; "
                "load the base model without quantization to merge into it."
            )
        return weight

    def _set_base_weight(self, weight: Tensor) -> None:
        if self.quantization_backend is None:
            self.get_base_layer().weight.data = weight
            return
        warnings.warn(
            f"merge: the base weight is quantized again ({self.quantization_backend.backend_name}), which rounds the "
            "sum with the adapter; the merged model differs from the adapted one by that.",
            stacklevel=3,
        )
        self.quantization_backend.set_base_weight(self, weight)

    def _base_weight_plus(self, adapters: list[str], sign: int) -> Tensor:
        weight = self._base_weight()
        total = weight.to(master_dtype(weight.dtype), copy=True)
        for adapter in adapters:
            total.add_(self.get_delta_weight(adapter).to(weight.device), alpha=sign)
        return total.to(weight.dtype)

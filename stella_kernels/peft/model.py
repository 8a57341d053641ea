"""The PEFT tuner: puts StelLA layers into a model. What PEFT does for every method is left to its ``BaseTuner``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    onload_layer,
    replicate_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .config import StellaConfig
from .layer import Linear, StellaLayer, layer_features
from .registration import PREFIX

BASE_ONLY = "__base__"


class StellaModel(BaseTuner):
    """A model with StelLA adapters (arXiv 2510.01938), made by ``peft.get_peft_model(model, StellaConfig(…))``.

    Factors are float32 masters whatever the base model's dtype (float64 for a float64 model), and stay so through
    ``model.to(torch.bfloat16)`` and ``autocast_adapter_dtype=False``.

    A step of a plain optimizer leaves the manifold: train with ``StellaTrainer``, ``StellaCallback``, or
    ``stella_kernels.optim.attach(optimizer, model)``.

    Raises:
        ValueError: a targeted layer cannot take the configured rank, or is not linear; no layer has been replaced then.
    """

    prefix: str = PREFIX
    tuner_layer_cls = StellaLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias: found {config.bias!r}, but the installed PEFT would train the biases and not save them; "
                "use bias='none', or a newer PEFT (pip install -U peft)."
            )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # PEFT replaces layers one by one, so a layer that cannot be adapted must be found before the first is replaced
        resolved = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        for name, module in model.named_modules():
            if name and PREFIX not in name and self._check_target_module_exists(resolved, name):
                self._check_layer(peft_config, name, module)
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

    def _check_layer(self, config: StellaConfig, name: str, module: nn.Module) -> None:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        features = layer_features(base)
        if features is None:
            raise ValueError(
                f"target_modules: {name!r} is a {type(base).__name__}, wanted a linear layer (nn.Linear, Conv1D, or a "
                "quantized one); leave it out, by target_modules or exclude_modules."
            )
        r, _ = _rank_and_alpha(config, name)
        if r > min(features):
            raise ValueError(
                f"r: found {r} for the layer {name!r} of {features[0]} inputs and {features[1]} outputs, wanted at "
                f"most {min(features)}; give it a smaller rank by rank_pattern, or leave it out by exclude_modules."
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r, alpha = _rank_and_alpha(peft_config, current_key)
        if isinstance(target, StellaLayer):
            target.update_layer(adapter_name, peft_config, r, alpha)
            return
        layer = Linear(target, adapter_name, peft_config, r, alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only once it is set active
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise ValueError(
                "merge: layers replicated by layer_replication share base weights, so adapters cannot be merged."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but every layer is checked before the first is changed.

        Raises:
            ValueError: with ``safe_merge``, a merged weight is not finite. TypeError: a base weight is quantized.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, by ``NotImplementedError``: a sum of adapters of rank r is no adapter of rank r on the manifolds."""
        raise NotImplementedError(
            "add_weighted_adapter: a weighted sum of StelLA adapters has no orthonormal factors of the same rank. Use "
            "them together, `model.base_model.set_adapter([...])`, or merge them, `model.merge_adapter([...])`."
        )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for layer in self.model.modules():
            if isinstance(layer, Linear):
                with onload_layer(layer):
                    layer.check_merge(safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` (one for each row of the batch) to the layers for one forward or ``generate``."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: mixed batches are for inference; call model.eval() first.")
        known = {BASE_ONLY} | {name for layer in self.modules() if isinstance(layer, StellaLayer) for name in layer.r}
        if unknown := sorted(set(names) - known):
            raise ValueError(f"adapter_names: found {unknown}, wanted adapters of this model: {sorted(known)}.")
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        # beam search repeats each row for the decoder; an encoder runs once, before that
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        in_encoder = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not self.model else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=list(names) if module in in_encoder else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, (StellaLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _rank_and_alpha(config: StellaConfig, name: str) -> tuple[int, float]:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    return r, alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}

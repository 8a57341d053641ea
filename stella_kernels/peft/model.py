"""The PEFT tuner: puts StelLA layers into a model. What PEFT does for every method is left to its ``BaseTuner``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    onload_layer,
    replicate_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from .base_layer import largest_rank, layer_features, layer_kind, why_unfit
from .combination import check_combination, combined_config, combined_factors, set_factors
from .config import StellaConfig
from .layer import StellaLayer
from .layers import AdaptedLayer, layer_class
from .merging import declare_untied, quantization_backend, separate_shared_weights
from .registration import PREFIX
from .targets import warn_of_aliases, warn_of_left_out, warn_of_unused, watched, why_never_called

BASE_ONLY = "__base__"


class StellaModel(BaseTuner):
    """A model with StelLA adapters (arXiv 2510.01938), made by ``peft.get_peft_model(model, StellaConfig(…))``.

    Factors are float32 masters whatever the base model's dtype (float64 for a float64 model), and stay so through
    ``model.to(torch.bfloat16)`` and ``autocast_adapter_dtype=False``.

    A step of a plain optimizer leaves the manifold: train with ``StellaTrainer``, ``StellaCallback``, or
    ``stella_kernels.optim.attach(optimizer, model)``.

    Raises:
        ValueError: a targeted layer cannot take the configured rank, is of no kind that can be adapted, or has a parent
            that reads its weight instead of calling it; no layer has been replaced then.
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
        if config.ensure_weight_tying and not hasattr(BaseTuner, "_add_modules_to_save_to_tie"):
            raise ValueError(
                "ensure_weight_tying: found True, but the installed PEFT would tie nothing; use False, or a newer PEFT "
                "(pip install -U peft)."
            )

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        # what PEFT does for LoRA, which is about no layer of the method's own
        LoraModel._add_modules_to_save_to_tie(cast(Any, self), peft_config, tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "ensure_weight_tying: found True with an embedding among target_modules, wanted False: StelLA ties whole "
            "modules and single tokens, not the adapters of an embedding and of a head that shares its weight."
        )

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's, but what cannot be adapted is refused before the first layer is replaced.

        Raises:
            ValueError: a targeted layer is of no kind that can be adapted, is too small for the rank, or is never
                called by its parent.
        """
        if state_dict is not None:  # PEFT then takes the layers that it names, whatever the configuration says
            names = {key.rsplit(f".{PREFIX}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
            present = [name for name, _ in model.named_modules() if name in names]
            self._check_layers(self.peft_config[adapter_name], model, present)
        config: Any = self.peft_config[adapter_name]
        config.stella_layer_kinds = {}  # written anew, for the layers of this model
        self._watched_modes: set[bool] = set()  # of training and evaluation, those in which layers have been watched
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # PEFT replaces layers one by one, so a layer that cannot be adapted must be found before the first is replaced
        resolved, left_out = self._resolved(peft_config, model)
        targeted = [
            name
            for name, _ in model.named_modules()
            if name and PREFIX not in name and self._check_target_module_exists(resolved, name)
        ]
        self._check_layers(peft_config, model, targeted)
        if left_out and not targeted:
            raise ValueError(
                f"target_modules: 'all-linear' finds {', '.join(left_out)} and no other, and the first can take no "
                f"adapter that is heeded: {why_never_called(model, left_out[0])}."
            )
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)
        if left_out:  # else PEFT writes the names itself
            peft_config.target_modules = self._resolved(peft_config, model)[0].target_modules
            warn_of_left_out(model, left_out)

    def _resolved(self, peft_config: Any, model: nn.Module) -> tuple[Any, list[str]]:
        """The configuration with 'all-linear' written out, and the layers left out of it that are never called."""
        resolved: Any = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        if resolved.target_modules is peft_config.target_modules:
            return resolved, []
        found = sorted(name for name in resolved.target_modules if self._check_target_module_exists(resolved, name))
        left_out = [name for name in found if why_never_called(model, name) is not None]
        resolved.target_modules = set(resolved.target_modules) - set(left_out)
        return resolved, left_out

    def _check_layers(self, config: Any, model: nn.Module, names: Iterable[str]) -> None:
        names = list(names)
        warn_of_aliases(model, names)
        for name in names:
            self._check_layer(config, name, model.get_submodule(name))
            if (reason := why_never_called(model, name)) is not None:
                raise ValueError(
                    f"target_modules: {name!r} can take no adapter that is heeded: {reason}. Or leave it out, by "
                    "target_modules or exclude_modules."
                )

    def _check_layer(self, config: StellaConfig, name: str, module: nn.Module) -> None:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        features = layer_features(base)
        if features is None:
            raise ValueError(
                f"target_modules: {name!r} is a {type(base).__name__}, wanted a linear layer (nn.Linear, Conv1D, or a "
                "quantized one), nn.Embedding, or nn.Conv1d to nn.Conv3d; leave it out, by target_modules or "
                "exclude_modules."
            )
        if (reason := why_unfit(base)) is not None:
            raise ValueError(f"target_modules: {name!r} {reason}; leave it out, by target_modules or exclude_modules.")
        r, _ = _rank_and_alpha(config, name)
        if r > (most := largest_rank(base, *features)):
            raise ValueError(
                f"r: found {r} for the layer {name!r} of {features[0]} inputs and {features[1]} outputs, wanted at "
                f"most {most}; give it a smaller rank by rank_pattern, or leave it out by exclude_modules."
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
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if (kind := layer_kind(base)) is not None:
            peft_config.stella_layer_kinds[current_key] = kind
        if isinstance(target, StellaLayer):
            target.update_layer(adapter_name, peft_config, r, alpha)
            return
        layer = layer_class(base)(target, adapter_name, peft_config, r, alpha)
        layer.quantization_backend = quantization_backend(layer.get_base_layer(), self.model)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only once it is set active
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        with warnings.catch_warnings():  # of tied embeddings, for which PEFT has no remedy
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
            super()._check_merge_allowed()
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise ValueError(
                "merge: layers replicated by layer_replication share base weights, so adapters cannot be merged."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but every layer is checked before the first is changed, and where one fails all are put back.

        A quantized weight is then exactly what it was, another one up to the round-off of its dtype. A layer that
        shares its weight with another module (tied embeddings) is given its own, with a warning, until it is unmerged.

        Raises:
            ValueError: with ``safe_merge``, a merged weight is not finite.
            TypeError: a base weight is quantized in a way that cannot be written, or computed from others.
        """
        self._check_merge(adapter_names, safe_merge)
        with self._all_or_none():
            separate_shared_weights(self.model, adapter_names)
            super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:  # PEFT merges each layer as it takes it out; here all are merged before the first is
            self._check_merge(adapter_names, safe_merge)
            with self._all_or_none():
                separate_shared_weights(self.model, adapter_names)
                for layer in self.model.modules():
                    if isinstance(layer, AdaptedLayer):
                        with onload_layer(layer):
                            layer.merge(safe_merge, adapter_names)
        declare_untied(self.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **options: Any,
    ) -> None:
        """Add ``Σ w_i · adapter_i`` as a new adapter, with a scale of 1, inactive and frozen.

        Args:
            adapters: names of adapters of this model; a layer sums those that it has.
            weights: one each; negative ones subtract.
            adapter_name: the new adapter's.
            combination_type: 'cat', exact, of the sum of the ranks (at most a layer's smaller side), by a QR of the
                joined factors; or 'svd', that cut optimally to ``svd_rank``, at the cost of the small core.
            svd_rank: of 'svd'; the largest rank of the adapters by default.

        Raises:
            NotImplementedError: another ``combination_type``, or an option of PEFT's for one.
            ValueError, TypeError: an unknown or existing name, an argument of a wrong type, adapters with
                ``modules_to_save``. Nothing was changed.
        """
        if asked := [name for name in ("svd_clamp", "density") if options.get(name) is not None]:
            raise NotImplementedError(f"{asked[0]}: found {options[asked[0]]!r}, which StelLA's sums do not have.")
        check_combination(self.peft_config, adapters, weights, adapter_name, combination_type, svd_rank)
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        diagonal = all(config.stella_diag_s for config in configs)
        factors = combined_factors(self.model, adapters, weights, combination_type, svd_rank, diagonal)
        ranks = {name: U.shape[1] for name, (U, _, _) in factors.items()}
        self.peft_config[adapter_name] = combined_config(configs[0], ranks, diagonal)
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for name, each in factors.items():
            layer: Any = self.model.get_submodule(name)
            set_factors(layer, adapter_name, each)

    def subtract(self, minuend: str, subtrahend: str, adapter_name: str, **options: Any) -> None:
        """Add ``minuend − subtrahend`` as a new adapter: ``add_weighted_adapter`` with weights 1 and −1, 'cat'."""
        options.setdefault("combination_type", "cat")
        self.add_weighted_adapter([minuend, subtrahend], [1.0, -1.0], adapter_name, **options)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # a whole module comes back; its weight is its own
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Within: where an error is raised, layers that were merged by then are unmerged again."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, AdaptedLayer)]
        before = [(layer, list(layer.merged_adapters), layer.kept_base()) for layer in layers]
        try:
            yield
        except BaseException:
            for layer, merged, kept in before:
                if kept is not None:
                    layer.put_back(kept)
                elif new := [name for name in layer.merged_adapters if name not in merged]:
                    with onload_layer(layer):
                        layer.unmerge(new)
                layer.share_weight_again()
            raise

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, AdaptedLayer):
                with onload_layer(layer):
                    layer.check_merge(safe_merge, adapter_names, repr(name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, and a stored start ('pseudo_zero') finds its layer also where the model has none yet."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        starts = tuple(f".{PREFIX}{kind}.weight" for kind in ("U0", "Vt0"))
        return {
            f"{key.removesuffix('.weight')}.{adapter_name}.weight" if key.endswith(starts) else key: value
            for key, value in remapped.items()
        }

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` (one for each row of the batch) to the layers for one forward or ``generate``.

        The first time in training and in evaluation, layers that the model never calls are warned of.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            if torch.compiler.is_compiling() or self.training in self._watched_modes:
                yield
                return
            layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, AdaptedLayer)]
            with watched(layers) as seen:
                yield
            self._watched_modes.add(self.training)
            warn_of_unused(seen, self.training)
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

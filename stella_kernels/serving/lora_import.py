"""From LoRA to StelLA, of the same rank and exactly: ``s B A = s U S Vᵀ`` by a QR of B and one of Aᵀ."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..checks import NonFiniteError
from . import factored
from .adapter_files import PREFIX, Settings
from .export import pattern_value
from .factored import Factored
from .layer_kinds import FIELD, Kind, as_matrices

_CARRIED = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
)
# These say nothing of what the adapter adds.
_HARMLESS = (
    "alpha_pattern",  # read below
    "corda_config",  # matters with the start that goes with it, as the next ones
    "eva_config",
    "inference_mode",
    "init_lora_weights",  # checked below
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "velora_config",  # compresses what is kept for the backward pass
)
_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base weights alone


def lora_layers(
    settings: Settings, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Factored], dict[str, Kind], dict[str, Tensor]]:
    """``B A`` of the layers of a LoRA adapter by module name, without its scale; the kinds of those that are no linear
    layers; and the tensors of its extras.

    Raises:
        ValueError: the adapter is no plain LoRA; the message names the field or the tensor.
    """
    for field, value in settings.items():
        if field not in _CARRIED and field not in _HARMLESS and value:
            raise ValueError(
                f"{field}: found {value!r}, which is no part of a plain LoRA and has no counterpart in StelLA; merge "
                "the adapter into its base model and start from that instead."
            )
    if (start := settings.get("init_lora_weights", True)) not in _STARTS:
        raise ValueError(
            f"init_lora_weights: found {start!r}, a start that changes the base weights, so that the adapter alone is "
            "not what was trained. Convert it to a plain LoRA first: model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...), see PEFT's documentation."
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        name, mark, kind = key.removesuffix(".weight").rpartition(".lora_")
        if mark and kind in ("A", "B", "embedding_A", "embedding_B"):
            pairs.setdefault(name.removeprefix(PREFIX), {})[kind] = tensor
        elif mark:
            raise ValueError(
                f"{key}: found a tensor of shape {tuple(tensor.shape)}, wanted lora_A and lora_B, or lora_embedding_A "
                "and lora_embedding_B; biases and magnitudes of LoRA have no counterpart in StelLA."
            )
        else:
            others[key] = tensor
    if not pairs:
        raise ValueError("the adapter: found no tensor named '….lora_A.weight', wanted the matrices of LoRA.")
    layers: dict[str, Factored] = {}
    kinds: dict[str, Kind] = {}
    for name, found in pairs.items():
        A, B, layer_kind = as_matrices(name, found)
        if not all(bool(matrix.isfinite().all()) for matrix in found.values()):
            raise NonFiniteError(f"{name}: its matrices hold NaN or an infinity; nothing was written.", [name])
        layers[name] = factored.from_lora(A, B)
        if layer_kind is not None:
            kinds[name] = layer_kind
    return layers, kinds, others


def stella_adapter(
    layers: Mapping[str, Factored], kinds: Mapping[str, Kind], settings: Settings, *, diagonal: bool = False
) -> tuple[Settings, dict[str, Tensor], dict[str, int]]:
    """The configuration, the tensors (float32) and the ranks of the StelLA adapter. The scale stays the LoRA's own.

    Args:
        layers: by module name, of LoRA's rank.
        kinds: of those layers that are not linear.
        settings: the LoRA adapter's configuration.
        diagonal: S as its singular values, and ``stella_diag_s``.
    """
    stella: Settings = {name: settings[name] for name in _CARRIED if name in settings}
    stella.update({"peft_type": "STELLA", "inference_mode": True, "stella_diag_s": diagonal, FIELD: kinds})
    ranks, alphas = dict(stella.get("rank_pattern") or {}), dict(settings.get("alpha_pattern") or {})
    tensors, found_ranks = {}, {}
    for name, layer in layers.items():
        if diagonal:
            U, S, Vt = factored.singular(layer)
        else:
            turned = factored.orthonormalised(layer)
            U, S, Vt = turned.left, turned.core, turned.right
        k = found_ranks[name] = U.shape[1]
        if k != layer.rank:  # LoRA's rank is more than the layer can have; the scale stays what it was
            alpha = pattern_value(settings.get("alpha_pattern"), name, settings["lora_alpha"])
            share = k / layer.rank
            ranks = {f"^{name}": k, **ranks}
            alphas = {f"^{name}": alpha * (math.sqrt(share) if settings.get("use_rslora") else share), **alphas}
        for kind, factor in (("U", U), ("S", S), ("Vt", Vt)):
            tensors[f"{PREFIX}{name}.stella_{kind}.weight"] = factor.float().contiguous()
    stella.update(rank_pattern=ranks, alpha_pattern=alphas)
    return stella, tensors, found_ranks

"""From StelLA to LoRA: the tensors and the configuration of a LoRA adapter that any server of LoRA reads.

``A = Vᵀ`` and ``B = s U S`` in float64, rounded once. The scale goes into B, so that every reader's own scale is 1:
some (llama.cpp) divide alpha by the rank of each tensor and know neither rsLoRA nor patterns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import NonFiniteError, check_choice
from . import factored
from .adapter_files import Settings
from .factored import Factored
from .layer_kinds import FIELD, Kind, lora_tensors

Number = TypeVar("Number", int, float)

# What an adapter may hold beside its factors: PEFT reads it, most servers do not.
EXTRAS = ("bias", "layer_replication", "modules_to_save", "trainable_token_indices")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# The values that vLLM accepts for --max-lora-rank; 16 is its default.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_CARRIED = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "revision",
    "target_modules",
    "task_type",
)
_READERS = {
    "bias": "vLLM refuses an adapter with biases, and llama.cpp's converter stops at them",
    "layer_replication": "only PEFT can stack layers so; a server has to be given the deeper model itself",
    "modules_to_save": "vLLM reads those named 'classifier' and 'score' only, and llama.cpp none",
    "trainable_token_indices": "only PEFT reads embeddings of single tokens",
}


@dataclass(frozen=True)
class LoraReport:
    """What was written: ``rank`` of the adapter, true rank by layer, number of bytes, extras that few servers read."""

    rank: int
    ranks: dict[str, int]
    size: int
    extras: tuple[str, ...]

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        spread = "" if len(ranks) == 1 else f" (layers have rank {ranks[0]} to {ranks[-1]})"
        lines = [f"LoRA of rank {self.rank}{spread}, {len(self.ranks)} layers, {self.size / 1e6:.1f} MB"]
        if self.rank > VLLM_RANKS[-1]:
            lines.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]} only")
        elif self.rank > 16:
            wanted = next(rank for rank in VLLM_RANKS if rank >= self.rank)
            lines.append(f"vLLM needs --max-lora-rank {wanted}, its default is 16")
        lines += [f"{name}: written for PEFT; {_READERS[name]}" for name in self.extras]
        return "\n".join(lines)


def check_options(rank: object, dtype: object, also: object) -> None:
    """Raise ``TypeError`` or ``ValueError``, naming the argument, for what an export cannot be asked."""
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int | float):
            raise TypeError(f"rank: found {rank!r}, wanted None (exact), a whole number, or a share of the energy.")
        if isinstance(rank, int) and rank < 1:
            raise ValueError(f"rank: found {rank}, wanted a whole number, 1 or more.")
        if isinstance(rank, float) and not 0 < rank <= 1:
            raise ValueError(f"rank: found {rank}, wanted a share of the energy, above 0 and at most 1.")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: found {dtype!r}, wanted one of {', '.join(map(str, DTYPES.values()))}.")
    if isinstance(also, str) or not isinstance(also, Iterable):
        raise TypeError(f"also: found {also!r}, wanted a list of names among {', '.join(EXTRAS)}.")
    for name in also:
        check_choice("also", name, EXTRAS)


def extras_of(settings: Settings, also: Iterable[str]) -> tuple[str, ...]:
    """The extras that the adapter has, all of them allowed by ``also``.

    Raises:
        ValueError: it has one that ``also`` does not allow; the message says which server would not read it.
    """
    values = {name: settings.get(name) for name in EXTRAS}
    if values["bias"] == "none":
        values["bias"] = None
    found = tuple(name for name in EXTRAS if values[name])
    for name in found:
        if name not in also:
            raise ValueError(
                f"{name}: found {values[name]!r}, and {_READERS[name]}. Allow it, also=[{name!r}] (on the command line "
                f"--also {name}), to write it the way PEFT reads it, or merge the adapter into the model instead."
            )
    return found


def scale_of(settings: Settings, name: str) -> float:
    """``s`` of the layer ``name`` by the configuration: alpha / r, or alpha / sqrt(r) with rsLoRA, by pattern."""
    r = pattern_value(settings.get("rank_pattern"), name, settings["r"])
    alpha = pattern_value(settings.get("alpha_pattern"), name, settings["lora_alpha"])
    return float(alpha) / (math.sqrt(r) if settings.get("use_rslora") else r)


def pattern_value(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """What ``pattern`` says of a layer: the value of the first key that matches the end of its name, as in PEFT."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def lora_layer(name: str, layer: Factored, rank: int | float | None) -> tuple[Tensor, Tensor]:
    """A (k, n) and B (m, k) of one layer, float64: exact, or cut to ``rank`` (a share of the energy where a float).

    Raises:
        NonFiniteError: a factor holds NaN or an infinity.
    """
    if not all(bool(part.isfinite().all()) for part in (layer.left, layer.core, layer.right)):
        raise NonFiniteError(f"{name}: its factors hold NaN or an infinity; nothing was written.", [name])
    if rank is None or (isinstance(rank, int) and rank >= layer.rank):
        return layer.right, layer.left @ layer.core
    left, values, right = factored.singular(layer)
    kept = rank if isinstance(rank, int) else factored.rank_for_energy(values, rank)
    return right[:kept], left[:, :kept] * values[:kept]


def lora_adapter(
    layers: Mapping[str, Factored],
    settings: Settings,
    *,
    rank: int | float | None = None,
    dtype: torch.dtype = torch.float32,
    rank_pattern: bool = False,
    also: Sequence[str] = (),
) -> tuple[Settings, dict[str, Tensor], LoraReport]:
    """The configuration and the tensors of the LoRA adapter, without the extras' own tensors.

    Args:
        layers: by the full name of the module, without PEFT's prefix.
        settings: the StelLA adapter's configuration.
        rank: None is exact; a whole number or a share of the energy cuts, optimally.
        dtype: of the tensors.
        rank_pattern: leave ranks that differ as they are and write them down, which few servers read; else smaller
            ones are filled up with zeros.
        also: extras to write.
    """
    check_options(rank, dtype, also)
    extras = extras_of(settings, also)
    pairs = {name: lora_layer(name, layer, rank) for name, layer in layers.items()}
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    widest = max(ranks.values())
    kinds: Mapping[str, Kind] = settings.get(FIELD) or {}
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        missing = 0 if rank_pattern else widest - len(A)
        A, B = torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))
        stored = lora_tensors(name, A, B, kinds.get(name))
        tensors.update({key: rounded(matrix, dtype, name) for key, matrix in stored.items()})
    patterns = by_name({n: r for n, r in ranks.items() if r != widest}, ranks) if rank_pattern else {}
    lora: Settings = {name: settings[name] for name in _CARRIED if name in settings}
    lora.update(
        {
            "peft_type": "LORA",
            "inference_mode": True,
            "r": widest,
            "lora_alpha": widest,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "rank_pattern": patterns,
            "alpha_pattern": dict(patterns),
            "bias": settings.get("bias", "none") if "bias" in extras else "none",
            "modules_to_save": settings.get("modules_to_save"),
            "layer_replication": settings.get("layer_replication"),
            "trainable_token_indices": settings.get("trainable_token_indices"),
            "ensure_weight_tying": settings.get("ensure_weight_tying", False),
        }
    )
    if not _selects(lora, layers):
        lora.update(target_modules=sorted(layers), exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return lora, tensors, LoraReport(widest, ranks, size, extras)


def rounded(matrix: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In ``dtype``, contiguous. Raises ``ValueError`` where finite numbers overflow it."""
    result = matrix.to(dtype).contiguous()
    if not bool(result.isfinite().all()):
        raise ValueError(f"dtype: {name} overflows {dtype}, wanted a wider one, torch.float32 or torch.bfloat16.")
    return result


def by_name(differing: Mapping[str, Number], every: Iterable[str]) -> dict[str, Number]:
    """A ``rank_pattern`` or ``alpha_pattern`` of full names; ``^`` before a name that is also another's ending."""
    endings = {".".join(name.split(".")[i:]) for name in every for i in range(1, name.count(".") + 1)}
    return {f"^{name}" if name in endings else name: number for name, number in differing.items()}


def _selects(settings: Settings, names: Iterable[str]) -> bool:
    """Whether the configured ``target_modules`` name all these layers; one injected by a state dict's keys may not."""
    targets: Any = settings.get("target_modules")
    if isinstance(targets, str):
        return targets != "all-linear" and all(re.fullmatch(targets, name) for name in names)
    wanted = set(targets or ())
    return all(any(".".join(name.split(".")[i:]) in wanted for i in range(name.count(".") + 1)) for name in names)

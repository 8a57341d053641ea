"""Folders in which PEFT keeps an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``, without PEFT."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."  # of every key in such a file

Settings = dict[str, Any]


def read_adapter(folder: str | os.PathLike[str], peft_type: str) -> tuple[Settings, dict[str, Tensor]]:
    """The configuration and the tensors (on the CPU) of the adapter in ``folder``.

    Raises:
        FileNotFoundError: it has no configuration or no weights.
        ValueError: the adapter is not of the type ``peft_type``, or a file cannot be read.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path}: found no {CONFIG}, wanted the folder of an adapter that PEFT saved.")
    try:
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: found no JSON ({error}).") from error
    found = settings.get("peft_type") if isinstance(settings, dict) else None
    if found != peft_type:
        raise ValueError(f"{path / CONFIG}: found peft_type {found!r}, wanted {peft_type!r}.")
    if (path / WEIGHTS).is_file():
        from safetensors.torch import load_file

        return settings, load_file(path / WEIGHTS)
    if (path / OLD_WEIGHTS).is_file():
        return settings, torch.load(path / OLD_WEIGHTS, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"{path}: found neither {WEIGHTS} nor {OLD_WEIGHTS}.")


def write_adapter(folder: str | os.PathLike[str], settings: Settings, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter for PEFT, the configuration last: without it nobody takes the folder for an adapter."""
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # safetensors keeps no strides and refuses memory that two tensors share
    stored = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(stored, path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(_plain(settings), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

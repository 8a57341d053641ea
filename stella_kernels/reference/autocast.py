"""Autocast turned off where dtypes are settled: a float32 factor rounded to bfloat16 would not be orthonormal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; of one that has none (meta), torch would raise an error."""
    kind = device.type  # of two it need not be asked, at every call
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, what is computed on ``device`` is computed in the dtypes that it comes in."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, which gives the same bits under autocast as outside, on the device of its first tensor."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        first = _first_tensor((*args, *kwargs.values()))
        if first is None or not autocasts(first.device):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def _first_tensor(values: Iterable[object]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (list, tuple)) and (found := _first_tensor(value)) is not None:
            return found
    return None

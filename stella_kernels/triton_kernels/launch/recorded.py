"""What a launch plan consists of (``plan.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Where an address comes from: an argument, a result, the scratch.
ARGUMENT, RESULT, SCRATCH = 0, 1, 2


@dataclass(slots=True)
class Launch:
    """A compiled kernel, its grid, and the values of all arguments, with ``places`` for addresses."""

    compiled: Any
    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: object
    metadata: object
    values: list[Any]
    places: list[tuple[int, int, int]]  # position, where from, which or how far in


@dataclass(slots=True)
class Plan:
    launches: list[Launch]
    results: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]  # shape, strides
    scratch: int  # bytes
    single: bool  # whether the operator returns a tensor or several
    extents: list[int]  # bytes from the first to past the last of each tensor argument
    device: torch.device
    handed: list[Any] | None = None  # its launches as the native module takes them, none where it cannot

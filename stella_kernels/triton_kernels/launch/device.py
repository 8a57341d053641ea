"""The device of a launch: Triton's target, the current device, and CUDA graphs that are being captured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

_captured: list[object] = []  # what CUDA graphs have addresses of: they may be replayed for as long as the process runs


@lru_cache(maxsize=1)
def target_backend() -> str:
    """'cuda' or 'hip', and 'interpreter' where kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return str(triton.runtime.driver.active.get_current_target().backend)


@lru_cache(maxsize=1)
def target_arch() -> object:
    """The compute capability times ten, AMD's name of an architecture, or nothing where kernels are interpreted."""
    if target_backend() == "interpreter":
        return None
    return triton.runtime.driver.active.get_current_target().arch


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device and stream: make it the tensor's device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether launches on the current stream of a device are recorded to a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def keep_for_graphs(device: torch.device, memory: object) -> None:
    """Never free ``memory`` where a CUDA graph is being captured that will read it."""
    if capturing(device) and not any(memory is kept for kept in _captured):
        _captured.append(memory)

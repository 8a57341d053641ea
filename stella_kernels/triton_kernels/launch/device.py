"""The device of a launch: Triton's target, the current device, and CUDA graphs that are being captured."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ...checks import BackendUnavailableError
from ...operators import backends

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


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on that GPU, or are interpreted; where not, the reference serves.

    Raises ``BackendUnavailableError`` where ``STELLA_KERNELS_BACKEND=triton`` wants them to run.
    """
    if device.type != "cuda":
        return True
    reason = backends.gpu_too_old(device.index)
    if reason and backends.requested() == "triton":
        raise BackendUnavailableError(f"STELLA_KERNELS_BACKEND=triton: {reason}.")
    return not reason


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


def sent(here: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, by a copy that nothing waits for.

    A CUDA graph that is being captured copies anew at each replay: what it reads on the host is then kept for good.
    """
    if device.type != "cuda" or not here.numel():
        return here.to(device)
    pinned = here.pin_memory()
    keep_for_graphs(device, pinned)
    return pinned.to(device, non_blocking=True)


class Shared:
    """Memory of a device that calls share, from whatever stream they come; filled on the stream that is current now.

    A stream that meets it for the first time waits for what filled it, and the allocator, once it is freed, for what
    that stream still reads.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._streams: set[int] = set()
        self._filled: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda and not capturing(tensors[0].device):
            stream = torch.cuda.current_stream(tensors[0].device)
            self._filled = stream.record_event()
            self._streams.add(stream.cuda_stream)

    def use(self) -> None:
        """To be called before each launch that reads or writes it."""
        if self._filled is None:  # not on a GPU, or of one graph alone
            return
        stream = torch.cuda.current_stream(self.tensors[0].device)
        if stream.cuda_stream in self._streams:
            return
        if not capturing(stream.device):  # to be captured on, a stream has waited for all others already
            stream.wait_event(self._filled)
        for tensor in self.tensors:
            tensor.record_stream(stream)
        self._streams.add(stream.cuda_stream)

"""Where the bench runs: the device that ``--device`` names, its clock, and the peak memory of a call on it."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import torch

from stella_kernels.operators import backends

CPU = torch.device("cpu")
_HIGH_WATER = Path("/proc/self/clear_refs")  # Linux: what resets the mark that _STATUS shows
_STATUS = Path("/proc/self/status")


class DeviceUnavailableError(RuntimeError):
    """A device that was asked for is not there."""


def named(text: str) -> torch.device:
    """The device of this name, ``cpu``, ``cuda`` or ``cuda:1``, made torch's current one where it is a GPU.

    Raises:
        DeviceUnavailableError: it is not there, or none that the bench knows; says what is.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        raise DeviceUnavailableError(f"--device {text}: not a device; wanted cpu, cuda or cuda:INDEX.") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceUnavailableError(f"--device {text}: the kernels serve cpu and cuda alone; wanted one of them.")
    if device.type == "cpu":
        return CPU
    if not torch.cuda.is_available():
        reason = (
            "finds no GPU; see whether nvidia-smi (or rocm-smi) lists one, and what CUDA_VISIBLE_DEVICES says"
            if torch.version.cuda or torch.version.hip
            else "is built for the CPU alone; install a build for your GPU, and triton"
        )
        raise DeviceUnavailableError(f"--device {text}: torch {torch.__version__} {reason}.")
    count, index = torch.cuda.device_count(), device.index or 0
    if index >= count:
        found = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise DeviceUnavailableError(f"--device {text}: there is no such GPU; found {found}.")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("highest")  # whatever the environment asks for: float32 is compared to float32
    return torch.device("cuda", index)


def keep_memory() -> bool:
    """Have the C library keep the memory that it has once been given; returns whether it can be told so (glibc can).

    Else a result of tens of megabytes is given back when it is freed, and whether the next one is made of fresh pages,
    which take longer to come by than the kernels take, depends on what was allocated before it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def served(device: torch.device) -> str:
    """Which backend serves on the device, by an operator of each table.

    Raises:
        DeviceUnavailableError: it is a GPU that no kernels serve, and the reference was not asked for.
    """
    if device.type == "cuda" and backends.requested() != "reference" and (reason := backends.triton_why_not()):
        raise DeviceUnavailableError(
            f"--device {device}: Triton's kernels do not serve: {reason}, "
            "or set STELLA_KERNELS_BACKEND=reference to time the reference."
        )
    operators = ("polar", "stella_adamw_", "adapter_forward_")
    return ", ".join(f"{operator} by {backends.serving(operator, device.type)}" for operator in operators)


def three_of_tf32(device: torch.device) -> bool:
    """Whether Triton's kernels make a float32 product of three tf32 ones, on tensor cores: NVIDIA's since Ampere."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Float32 products of torch on tensor cores, inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def as_trained(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """What a forward pass runs inside: autocast for bfloat16 on a GPU, as trainers have it.

    Without it LoRA's float32 adapters would make float32 products there.
    """
    half = device.type == "cuda" and dtype == torch.bfloat16
    return torch.autocast(device.type, dtype) if half else nullcontext()


def description(device: torch.device) -> str:
    """What a table says of it: the GPU's name and its float32 products, or the threads that a CPU's operations have."""
    if device.type != "cuda":
        return f"{torch.get_num_threads()} threads"
    products = " (a float32 product is three of tf32)" if three_of_tf32(device) else ""
    return torch.cuda.get_device_name(device) + products


def platform_of(device: torch.device) -> str:
    """What a record says of it."""
    if device.type != "cuda":
        return platform.platform()
    return f"{platform.platform()}, {description(device)}, {torch.version.cuda or torch.version.hip}"


def host_seconds(run: Callable[[], object]) -> float:
    """Of a call that has done its work when it returns."""
    start = perf_counter()
    run()
    return perf_counter() - start


class GpuClock:
    """Seconds of a call on a GPU by its own events: from an idle stream to the end of the call's last kernel.

    What the host takes to launch counts wherever the GPU waits for it. The L2 cache, which holds the whole data of some
    rows, is written over before each call.
    """

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._other = torch.empty(max(size, 2**28), dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        stream = torch.cuda.current_stream(self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.zero_()
        stream.synchronize()
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


def clock_of(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """What times a call on the device."""
    return GpuClock(device) if device.type == "cuda" else host_seconds


def measures_memory(device: torch.device) -> bool:
    """Whether :func:`peak_bytes` can: of a CPU, on Linux alone."""
    return device.type == "cuda" or _HIGH_WATER.exists()


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """How far memory rises during a call above what it was before it.

    Of a GPU, what torch's allocator hands out; of a CPU, the kernel's high-water mark of the process's resident memory,
    so that whatever a kernel allocates behind torch's back is counted.
    """
    if device.type == "cuda":
        gc.collect()  # else what an earlier measurement left in cycles would be freed in the middle of this one
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # else the call would live on freed memory that is still resident
    _HIGH_WATER.write_text("5")  # the high-water mark falls to what is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before

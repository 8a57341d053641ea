"""Which configuration of a kernel runs: measured on the user's GPU at first use of a shape class, remembered on disk.

A kernel has a stated default and few candidates. The first call of a shape class on a device times them, keeps the
fastest and writes it to a file of its own, so that the next process need not. Of processes that measure the same at
the same time the first to write decides, and the others take its choice: replicas of one training agree where they
share the folder (machines that do not may round differently, as may two kinds of GPU).

``STELLA_KERNELS_AUTOTUNE=0`` takes the default always, measures nothing and reads nothing. So does
``torch.use_deterministic_algorithms(True)``, since another tile may round another way. While a CUDA graph is captured
nothing can be measured: what is not yet known is the default then. ``STELLA_KERNELS_CACHE`` is the folder of the
files; without it, ``stella_kernels`` below ``XDG_CACHE_HOME`` or ``~/.cache``. A file that cannot be read or written
costs a measurement, never an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ... import environment
from ...version import __version__
from .device import capturing
from .plan import unrecorded

T = TypeVar("T")
Clock = Callable[[Callable[[], None]], float]

WORTH = 0.98  # of the default's time: what a candidate needs to replace it, for noise alone must not

_log = logging.getLogger(__name__)
_known: dict[tuple[object, ...], Any] = {}  # by kernel, shape class and device, what this process has chosen
_one_at_a_time = RLock()


def enabled() -> bool:
    """Whether anything is measured: not with ``STELLA_KERNELS_AUTOTUNE=0``, nor where torch must be deterministic."""
    return environment.value("STELLA_KERNELS_AUTOTUNE") == "1" and not torch.are_deterministic_algorithms_enabled()


def cache_folder() -> Path:
    """Where choices are kept: ``STELLA_KERNELS_CACHE``, else by the XDG base directory specification."""
    if own := environment.value("STELLA_KERNELS_CACHE"):
        return Path(os.path.expanduser(own))
    shared = os.environ.get("XDG_CACHE_HOME", "")  # to be ignored where it is not absolute
    return Path(shared if os.path.isabs(shared) else os.path.expanduser("~/.cache")) / "stella_kernels"


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Of every source file of the kernels and their host side: a choice outlives none of their changes."""
    digest = hashlib.sha256()
    room = Path(__file__).parents[1]
    for path in sorted(room.rglob("*.py")):
        digest.update(path.relative_to(room).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _driver() -> str:
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text().strip()
        except OSError:
            continue
    # Where the kernel's module does not tell, the newest CUDA that the driver takes.
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version is not None else "unknown"


@lru_cache(maxsize=64)
def device_identity(device: torch.device) -> dict[str, str]:
    """What is told of a device and of the software that drives it, for the key."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "architecture": str(getattr(properties, "gcnArchName", f"{properties.major}.{properties.minor}")),
        "driver": _driver(),
        "runtime": str(torch.version.cuda or torch.version.hip),
    }


def gpu_milliseconds(run: Callable[[], None]) -> float:
    """Median time of a call on the current device, by its own events, the L2 cache emptied before each. Waits."""
    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))


def chosen(
    kernel: str,
    shape_class: tuple[object, ...],
    candidates: Sequence[T],
    default: T,
    run: Callable[[T], None],
    device: torch.device,
    clock: Clock | None = None,
) -> T:
    """The candidate that ``run`` is fastest with, by measurement at the first call of its kind, known after it.

    Args:
        kernel: what is tuned; with ``shape_class`` the name of the choice.
        shape_class: what else the best candidate depends on: dtype, padded rank, sizes rounded to powers of two. Few
            values in all, since each is measured. The candidates and the default depend on nothing else.
        candidates: configurations with a ``repr`` that tells them apart (dataclasses, tuples, dicts). ``default`` is
            one of them whether it is listed or not.
        default: what runs where nothing is measured.
        run: launches the kernel with a candidate, some tens of times. It must be repeatable and must write to memory of
            its own alone, never to the caller's: what is launched in place works on copies.
        device: of the tensors; without a ``clock``, one of another type than cuda takes the default.
        clock: seconds, or any other unit, of a call of the function that it is given; :func:`gpu_milliseconds` unless
            told, on ``device``.

    A candidate that does not compile or does not fit the device is passed over. Where there is no memory left to
    measure in, the default is taken until the process ends.

    Raises:
        ValueError: ``STELLA_KERNELS_AUTOTUNE`` is neither 0 nor 1.
    """
    if not enabled() or (clock is None and device.type != "cuda"):
        return default
    name = (kernel, shape_class, device)
    with _one_at_a_time:
        if name not in _known:
            every = [default, *(candidate for candidate in candidates if candidate != default)]
            parts = _key(kernel, shape_class, every, device)
            path = cache_folder() / "autotune" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"
            index = _read(path, parts)
            if index is None:
                if capturing(device):
                    return default
                times = _measured(every, run, device, clock)
                index = 0 if times is None else _publish(path, parts, times)
            _known[name] = every[index]
        found: T = _known[name]
    return found


def _key(kernel: str, shape_class: tuple[object, ...], every: Sequence[object], device: torch.device) -> dict[str, Any]:
    """All that a choice depends on, as JSON's own types."""
    return {
        "kernel": kernel,
        "shape class": repr(shape_class),
        "candidates": [repr(candidate) for candidate in every],
        "stella_kernels": __version__,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "source": source_hash(),
        **(device_identity(device) if device.type == "cuda" else {"device": device.type}),
    }


def _measured(
    every: Sequence[T], run: Callable[[T], None], device: torch.device, clock: Clock | None
) -> list[float] | None:
    """Time of each candidate, infinite where it does not compile or fit; None without memory to measure in."""

    def time_of(candidate: T) -> float:
        try:
            if clock is not None:
                return clock(lambda: run(candidate))
            with torch.cuda.device(device), unrecorded():
                return gpu_milliseconds(lambda: run(candidate))
        except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PassManager" not in str(error):  # a pass of the compiler
                raise
            _log.info("autotuning: %r passed over: %s", candidate, error)
            return math.inf

    try:
        return [time_of(candidate) for candidate in every]
    except RuntimeError as error:  # torch's OutOfMemoryError, or the driver's, by Triton
        if "out of memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        _log.info("autotuning: the default is taken: %s", error)
        return None


def _fastest(times: Sequence[float]) -> int:
    """Place of the fastest; the default's, the first, unless another is worth leaving it for."""
    best = min(range(len(times)), key=lambda i: times[i])
    return best if times[best] < WORTH * times[0] else 0


def _read(path: Path, parts: dict[str, Any]) -> int | None:
    """The choice in a file, or None where there is none, or none that can be trusted."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        index = parts["candidates"].index(record["choice"]) if record["key"] == parts else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return index


def _publish(path: Path, parts: dict[str, Any], times: list[float]) -> int:
    """Write what was measured, whole or not at all, and return the choice that all processes take."""
    index = _fastest(times)
    _log.info("autotuned %s %s: %s", parts["kernel"], parts["shape class"], parts["candidates"][index])
    record = {"key": parts, "choice": parts["candidates"][index], "times": [str(time) for time in times]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
            try:
                os.link(written, path)  # the first to get there decides
            except OSError:  # it is there, or the file system has no links
                if (earlier := _read(path, parts)) is not None:
                    return earlier
                os.replace(written, path)
        finally:
            Path(written).unlink(missing_ok=True)
    except OSError as error:
        _log.info("autotuning: not kept in %s: %s", path, error)
    return index

"""Which backends are there on this machine, which one serves each operator, and why another does not.

``STELLA_KERNELS_BACKEND`` chooses (``environment.py``): ``auto`` (default: the native library for CPU tensors where it
was built, Triton for those of a GPU where it is installed, else the reference), ``reference`` (pure PyTorch
everywhere), ``cpu`` or ``triton`` (as auto, but an error that says why where that one cannot serve).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass

import torch

from .. import environment
from ..checks import BackendUnavailableError
from .native.library import Standing, load
from .signatures import OPERATORS

_LEAST_CAPABILITY = 8  # of an NVIDIA GPU, its major number


@dataclass(frozen=True)
class Backend:
    """One backend: whether it serves, and if not, why not and what to do."""

    name: str
    available: bool
    why_not: str = ""


def requested() -> str:
    """The backend that ``STELLA_KERNELS_BACKEND`` asks for."""
    return environment.value("STELLA_KERNELS_BACKEND")


def triton_why_not() -> str:
    """Why Triton's kernels serve on no GPU of this machine; empty where they do. Starts CUDA where there is a GPU."""
    reason = _triton_cannot_start()
    if reason:
        return reason
    reasons = [gpu_too_old(index) for index in range(torch.cuda.device_count())]
    return reasons[0] if reasons and all(reasons) else ""


@functools.cache
def gpu_too_old(index: int) -> str:
    """Why the kernels do not run on that GPU; empty where they do. Older ones lack shared memory and instructions."""
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    if major >= _LEAST_CAPABILITY:
        return ""
    return (
        f"the GPU {torch.cuda.get_device_name(index)} has compute capability {major}.{minor}; the kernels want "
        f"{_LEAST_CAPABILITY}.0 or newer"
    )


def _triton_cannot_start() -> str:
    """As :func:`triton_why_not`, as far as can be told without starting CUDA."""
    missing = triton_missing()
    if not missing and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return missing


def triton_missing() -> str:
    """What stands in the way of Triton's kernels, whatever the GPU."""
    if requested() == "reference":
        return "STELLA_KERNELS_BACKEND=reference asks for the reference"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    compilers = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    if sys.platform == "linux" and not any(map(shutil.which, filter(None, compilers))):
        return "Triton compiles its launchers with a C compiler, and there is none; install gcc, or set CC"
    return ""


def _cpu_library(standing: Standing) -> Backend:
    """The CPU's backend; an error where ``STELLA_KERNELS_BACKEND`` asks for one that cannot serve."""
    why_not = f"{standing.why_not}; {standing.what_to_do}" if standing.state != "not asked for" else standing.why_not
    backend = Backend("cpu", standing.state == "serves", "" if standing.state == "serves" else why_not)
    if requested() == "cpu" and not backend.available:
        raise BackendUnavailableError(f"STELLA_KERNELS_BACKEND=cpu: {backend.why_not}.")
    if requested() == "triton" and (reason := _triton_cannot_start()):
        raise BackendUnavailableError(f"STELLA_KERNELS_BACKEND=triton: {reason}.")
    return backend


environment.check()
native_library = load()
_cpu = _cpu_library(native_library)


def backends() -> list[Backend]:
    """Every backend this release knows, best first."""
    reason = triton_why_not()
    return [_cpu, Backend("triton", not reason, reason), Backend("reference", True)]


def serving(operator: str, device: str = "cpu") -> str:
    """Name of the backend that serves ``operator`` (a name of ``torch.ops.stella_kernels``) on ``device``."""
    if device == "cpu" and _cpu.available and operator in OPERATORS:
        return "cpu"
    if device == "cuda" and operator in OPERATORS and not triton_why_not():
        return "triton"
    return "reference"


def passed_over(operator: str, device: str = "cpu") -> dict[str, str]:
    """Why each other backend does not serve ``operator`` on ``device``: backend name -> reason."""
    chosen = serving(operator, device)
    reasons = {}
    for backend in backends():
        if backend.name == chosen:
            continue
        if not backend.available:
            reasons[backend.name] = backend.why_not
        elif backend.name == "reference":
            reasons[backend.name] = "it serves where no kernel does"
        elif device != {"triton": "cuda"}.get(backend.name, backend.name):
            reasons[backend.name] = f"its kernels do not run on {device}"
        else:
            reasons[backend.name] = "it has no kernel for this operator"
    return reasons

"""Which backends are there on this machine, which one serves each operator, and why another does not.

``STELLA_KERNELS_BACKEND`` chooses: ``auto`` (default: the native library for CPU tensors where it was built, Triton for
those of a GPU where it is installed, else the reference), ``reference`` (pure PyTorch everywhere), ``cpu`` or
``triton`` (as auto, but an error that says why where that one cannot serve).
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from . import triton_backend
from .checks import BackendUnavailableError

CHOICES = ("auto", "reference", "cpu", "triton")
NATIVE_OPERATORS = (
    *("polar", "riemannian_gradient_", "project_retract_", "stella_adamw_"),
    *("philox_dropout", "adapter_forward_", "adapter_product", "adapter_backward_"),
)

_LIBRARY = Path(__file__).parent / "_cpu.so"


@dataclass(frozen=True)
class Backend:
    """One backend: whether it serves, and if not, why not and what to do."""

    name: str
    available: bool
    why_not: str = ""


def requested() -> str:
    """The backend that ``STELLA_KERNELS_BACKEND`` asks for."""
    choice = os.environ.get("STELLA_KERNELS_BACKEND", "auto") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"STELLA_KERNELS_BACKEND: found {choice!r}, wanted one of {', '.join(map(repr, CHOICES))}.")
    return choice


def _load_cpu_library() -> Backend:
    choice = requested()
    if choice == "reference":
        return Backend("cpu", False, "STELLA_KERNELS_BACKEND=reference asks for the reference")
    if not _LIBRARY.exists():
        backend = Backend(
            "cpu",
            False,
            "the native library was not built; install a C++ compiler, cmake, ninja and pybind11, then run "
            "STELLA_KERNELS_BUILD=cpu pip install --no-build-isolation . to see what is missing",
        )
    else:
        try:
            torch.ops.load_library(str(_LIBRARY))
            backend = Backend("cpu", True)
        except OSError as error:
            why_not = f"the native library does not load beside torch {torch.__version__}: {error}"
            backend = Backend("cpu", False, why_not)
    if choice == "cpu" and not backend.available:
        raise BackendUnavailableError(f"STELLA_KERNELS_BACKEND=cpu: {backend.why_not}.")
    if choice == "triton" and (reason := triton_backend.why_not()):
        raise BackendUnavailableError(f"STELLA_KERNELS_BACKEND=triton: {reason}.")
    return backend


_cpu = _load_cpu_library()


def backends() -> list[Backend]:
    """Every backend this release knows, best first."""
    reason = triton_backend.why_not()
    return [_cpu, Backend("triton", not reason, reason), Backend("reference", True)]


def serving(operator: str, device: str = "cpu") -> str:
    """Name of the backend that serves ``operator`` (a name of ``torch.ops.stella_kernels``) on ``device``."""
    if device == "cpu" and _cpu.available and operator in NATIVE_OPERATORS:
        return "cpu"
    if device == "cuda" and operator in triton_backend.OPERATORS and not triton_backend.why_not():
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


def build_info() -> ModuleType | None:
    """The pybind11 module with build information and plans, or None where nothing native was built."""
    try:
        return importlib.import_module("stella_kernels._build_info")
    except ImportError:
        return None

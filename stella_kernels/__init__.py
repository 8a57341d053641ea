"""StelLA adapters with the geometry for free. The public names, and nothing else."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from . import distributed, functional, nn, optim
from .functional import polar, stella_adapter, stella_linear
from .nn import StellaLinear
from .triton_kernels import registration as _registration  # noqa: F401  (for CUDA tensors; imports no Triton)
from .version import __version__

__all__ = [
    "StellaLinear",
    "__version__",
    "diagnostics",
    "distributed",
    "functional",
    "nn",
    "optim",
    "peft",
    "polar",
    "stella_adapter",
    "stella_linear",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("diagnostics", "peft"):  # imported when first asked for: PEFT is optional, diagnostics a side matter
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

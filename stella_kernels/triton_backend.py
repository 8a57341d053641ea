"""Whether Triton's kernels serve, and their registration for CUDA tensors; Triton itself is imported at the first call.

They are opaque operators to ``torch.compile``: no graph break, and nothing of Triton is traced. ``info`` of the
operators over lists is on the factors' device: they wait for nothing (an optimizer that reads it does, once a step),
and a CUDA graph can capture them once the tensors' addresses are known from a call before.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPERATORS = (
    *("polar", "riemannian_gradient_", "project_retract_", "stella_adamw_"),
    *("philox_dropout", "adapter_forward_", "adapter_product", "adapter_backward_"),
)


def why_not() -> str:
    """Why Triton's kernels do not serve on a GPU; empty where they do."""
    missing = _missing()
    if not missing and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return missing


def _missing() -> str:
    """What stands in the way of Triton's kernels, whatever the GPU."""
    if os.environ.get("STELLA_KERNELS_BACKEND") == "reference":
        return "STELLA_KERNELS_BACKEND=reference asks for the reference"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    compilers = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    if sys.platform == "linux" and not any(map(shutil.which, filter(None, compilers))):
        return "Triton compiles its launchers with a C compiler, and there is none; install gcc, or set CC"
    return ""


def interpreted() -> bool:
    """Whether Triton's interpreter is on, so that its kernels run on CPU tensors, slowly, to be tested."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def operators() -> dict[str, Callable[..., Any]]:
    """What Triton has, by operator; imports Triton."""
    found: dict[str, Callable[..., Any]] = importlib.import_module("stella_kernels.triton_kernels.operators").OPERATORS
    return found


def register(library: torch.library.Library) -> None:
    """Take over the CUDA key of every operator that Triton has, where it is installed and can work."""
    if _missing():
        return
    for name in OPERATORS:
        library.impl(name, _first_call_imports(name), "CUDA")


def _first_call_imports(name: str) -> Callable[..., Any]:
    def serve(*arguments: Any) -> Any:
        return operators()[name](*arguments)

    return serve


def on(device: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` for tensors of the CPU: run on copies of their memory on ``device``, which are then copied back.

    The same strides, gaps and aliases there as here, so that a table of cases made on the CPU judges a GPU.
    """

    def run(*arguments: Any) -> Any:
        memory: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def there(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [there(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            here = value.untyped_storage()
            if here.data_ptr() not in memory:
                copy = torch.empty(here.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
                memory[here.data_ptr()] = here, copy.copy_(here)
            copied = memory[here.data_ptr()][1]
            moved = torch.empty(0, dtype=value.dtype, device=device)
            return moved.set_(copied, value.storage_offset(), value.shape, value.stride())

        def back(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(back(item) for item in value)
            return value.cpu() if isinstance(value, Tensor) else value

        result = call(*(there(argument) for argument in arguments))
        for here, copied in memory.values():
            here.copy_(copied)
        return back(result)

    return run

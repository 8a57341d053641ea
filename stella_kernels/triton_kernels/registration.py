"""Triton's kernels under the CUDA key of every operator; Triton itself is imported at the first call.

They are opaque operators to ``torch.compile``: no graph break, and nothing of Triton is traced. ``info`` of the
operators over lists is on the factors' device: they wait for nothing (an optimizer that reads it does, once a step),
and a CUDA graph can capture them once the tensors' addresses are known from a call before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from ..operators.backends import triton_missing
from ..operators.registration import library
from ..operators.signatures import PHASES, SIGNATURES, Signature, positional


def interpreted() -> bool:
    """Whether Triton's interpreter is on, so that its kernels run on CPU tensors, slowly, to be tested."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@functools.cache
def operators() -> dict[str, Callable[..., Any]]:
    """What Triton has, by operator, to be called as torch calls it; imports Triton.

    Those of a layer, called some hundred times a step, are launched by plans (``launch/plan.py``).
    """
    stiefel, phases, adapter = (
        importlib.import_module(f"stella_kernels.triton_kernels.{module}").IMPLEMENTATIONS
        for module in ("stiefel.operators", "stiefel.phases", "adapter.operators")
    )
    lists = {**stiefel, **phases}
    planned = importlib.import_module("stella_kernels.triton_kernels.launch.plan").Planned
    return {
        signature.name: positional(signature, lists[signature.name])
        if signature.name in lists
        else planned(signature, adapter[signature.name])
        for signature in (*SIGNATURES, *PHASES)
    }


def launch_natively(key: str) -> None:
    """Have plans launched by the native module, where it is built, for what torch dispatches under ``key``."""
    importlib.import_module("stella_kernels.triton_kernels.launch.native").enable(key)


def _first_call_imports(signature: type[Signature]) -> Callable[..., Any]:
    known: list[Callable[..., Any]] = []

    def serve(*arguments: Any) -> Any:
        if not known:
            known.append(operators()[signature.name])
            launch_natively("CUDA")
        return known[0](*arguments)

    return serve


if not triton_missing():
    for _signature in (*SIGNATURES, *PHASES):
        library.impl(_signature.name, _first_call_imports(_signature), "CUDA")

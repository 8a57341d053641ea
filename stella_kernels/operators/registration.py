"""The operators put before torch: ``torch.ops.stella_kernels``, with schema, reference and fake of each.

Importing this module compiles nothing. It loads the CPU library, where there is one (``backends.py``), which registers
itself; Triton's kernels are registered by ``triton_kernels/registration.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .arguments import check_devices
from .fakes import FAKES
from .fallback import REFERENCE
from .signatures import PHASES, SIGNATURES, Signature, positional

library = torch.library.Library("stella_kernels", "DEF")


def _fake(signature: type[Signature]) -> Callable[..., Any]:
    def fake(a: Signature) -> Any:
        check_devices(a)
        return FAKES[signature](a)

    return positional(signature, fake)


def _of_negated_views(signature: type[Signature]) -> Callable[..., Any]:
    """Of tensors that are read the values; torch would refuse a list that is written without saying which."""

    def values(each: Any, value: Any, at: str = "") -> Any:
        if isinstance(value, (list, tuple)):
            return [values(each, item, f"[{i}]") for i, item in enumerate(value)]
        if not isinstance(value, Tensor) or not value.is_neg():
            return value
        if each.metadata.get("written"):
            raise RuntimeError(
                f"{signature.name}: {each.name}{at}: found a negated view, wanted a plain tensor, since it is written; "
                "pass .resolve_neg()."
            )
        return value.resolve_neg()

    def serve(a: Signature) -> Any:
        given = [values(each, getattr(a, each.name)) for each in fields(a)]  # type: ignore[arg-type]
        return getattr(torch.ops.stella_kernels, signature.name)(*given)

    return positional(signature, serve)


for _signature in (*SIGNATURES, *PHASES):
    library.define(_signature.schema())
    library.impl(_signature.name, REFERENCE[_signature.name], "CompositeExplicitAutograd")
    library.impl(_signature.name, _of_negated_views(_signature), "Negative")
    torch.library.register_fake(f"stella_kernels::{_signature.name}", _fake(_signature), lib=library)

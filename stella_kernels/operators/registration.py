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

from . import backends, signatures
from .arguments import check_devices
from .fallback import REFERENCE
from .signatures import PHASES, SIGNATURES, Signature, positional
from .status import INFO_COLUMNS, arithmetic_dtype, grams_words, sums_words

library = torch.library.Library("stella_kernels", "DEF")


# ---- fakes: shapes, dtypes and devices of each operator's results, under tracing -------------------------------------


def _info(factors: list[Tensor]) -> Tensor:
    device = factors[0].device if factors else torch.device("cpu")
    # Triton's operators leave it on the device, also where they pass a GPU's factors on to the reference.
    there = device.type == "cuda" and not backends.triton_missing()
    return torch.empty((len(factors), INFO_COLUMNS), dtype=torch.float64, device=device if there else "cpu")


def _polar(a: signatures.Polar) -> tuple[Tensor, Tensor]:
    batch = 1
    for size in a.M.shape[:-2]:
        batch = batch * size
    Q = torch.empty_like(a.M, memory_format=torch.contiguous_format)
    return Q, a.M.new_empty((batch, INFO_COLUMNS), dtype=torch.float64, device="cpu")


def _riemannian_gradient_(a: signatures.RiemannianGradient) -> Tensor:
    return _info(a.gradients)


def _project_retract_(a: signatures.ProjectRetract) -> Tensor:
    return _info(a.moved)


def _stella_adamw_(a: signatures.StellaAdamWStep) -> Tensor:
    return _info(a.factors)


def _flat(like: list[Tensor], words: Callable[[int], int]) -> Tensor:
    if not like:
        return torch.empty(0, dtype=torch.float32)
    total = sum(words(factor.shape[1]) for factor in like)
    return like[0].new_empty(total, dtype=arithmetic_dtype(like[0].dtype))


def _gradient_gram(a: signatures.GradientGram) -> Tensor:
    return _flat(a.factors, sums_words)


def _riemannian_gradient_rows_(a: signatures.RiemannianGradientRows) -> Tensor:
    return a.sums.new_empty(0)


def _retract_gram(a: signatures.RetractGram) -> Tensor:
    return _flat(a.moved, grams_words)


def _retract_rows_(a: signatures.RetractRows) -> Tensor:
    return _info(a.moved)


def _adamw_gram_(a: signatures.AdamWGram) -> tuple[Tensor, Tensor]:
    grams = _flat(a.factors, grams_words)
    return grams, grams.new_empty(torch.library.get_ctx().new_dynamic_size())  # the implementation's own affair


def _adamw_rows_(a: signatures.AdamWRows) -> Tensor:
    return _info(a.factors)


def _philox_dropout(a: signatures.PhiloxDropout) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.contiguous_format)


def _adapter_forward_(a: signatures.AdapterForward) -> Tensor:
    return a.y.new_empty((a.x.shape[0], a.Vt.shape[0]))  # (T, r)


def _adapter_product(a: signatures.AdapterProduct) -> tuple[Tensor, Tensor]:
    T, m, r = a.x.shape[0], a.U.shape[0], a.Vt.shape[0]
    return a.x.new_empty((T, m)), a.x.new_empty((T, r))


def _adapter_backward_(a: signatures.AdapterBackward) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip((a.U, a.S, a.Vt), a.needed, strict=True)
    )


FAKES: dict[type[signatures.Signature], Callable[[Any], Any]] = {
    signatures.Polar: _polar,
    signatures.RiemannianGradient: _riemannian_gradient_,
    signatures.ProjectRetract: _project_retract_,
    signatures.StellaAdamWStep: _stella_adamw_,
    signatures.GradientGram: _gradient_gram,
    signatures.RiemannianGradientRows: _riemannian_gradient_rows_,
    signatures.RetractGram: _retract_gram,
    signatures.RetractRows: _retract_rows_,
    signatures.AdamWGram: _adamw_gram_,
    signatures.AdamWRows: _adamw_rows_,
    signatures.PhiloxDropout: _philox_dropout,
    signatures.AdapterForward: _adapter_forward_,
    signatures.AdapterProduct: _adapter_product,
    signatures.AdapterBackward: _adapter_backward_,
}


# ---- schema, reference and fake of each ------------------------------------------------------------------------------


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

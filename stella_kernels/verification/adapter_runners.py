"""The runners of the adapter's operators and its dropout, as in ``stiefel_runners.py``."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from ..reference import adapter, philox
from .case_data import (
    Implementation,
    Measures,
    gaussian,
    orthonormal,
    poisoned,
    relative,
    round_off,
    safety,
    store,
)
from .case_table import Case


def _adapter_data(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], float, Tensor | None]:
    """Stored tensors, the same in float64, s and the seed of dropout. Factors are float32 masters or wider."""
    T, m, n, r = case.shapes[0]
    generator = case.generator()
    masters = torch.float64 if case.dtype == torch.float64 else torch.float32
    S = torch.randn((r,) if case.diagonal else (r, r), generator=generator, dtype=torch.float64)
    activations = {
        name: torch.randn(T, k, generator=generator, dtype=torch.float64) for name, k in (("x", n), ("y", m))
    }
    factors = {"U": orthonormal((m, r), generator), "S": S, "Vt": orthonormal((n, r), generator).mT.contiguous()}
    stored = {name: store(value, case)[0] for name, value in activations.items()}
    stored |= {name: value.to(masters) for name, value in factors.items()}
    seed = torch.tensor(zlib.crc32(case.name.encode()) << 20) if case.dropout else None
    return stored, {name: value.double().clone() for name, value in stored.items()}, 1.7, seed


def _adapter_tolerance(case: Case) -> float:
    """Five roundings to the storage type (factors, A, P or Q and K, the result), and sums of up to max(T, m, n)."""
    u, w = round_off(case.dtype)
    return safety(case.dtype) * (u + w * math.sqrt(max(case.shapes[0])))


def forward(case: Case, run: Implementation) -> Measures:
    t, exact, s, seed = _adapter_data(case)
    with poisoned(run, []):
        A = run["adapter_forward_"](t["y"], t["x"], t["U"], t["S"], t["Vt"], s, case.dropout, seed)
    factors = exact["U"], exact["S"], exact["Vt"]
    term, exact_A = adapter.adapter_forward(exact["x"], *factors, s, case.dropout, seed)
    yield "y", relative(t["y"], exact["y"] + term), _adapter_tolerance(case)
    yield "A", relative(A, exact_A), _adapter_tolerance(case)


def product(case: Case, run: Implementation) -> Measures:
    t, exact, s, seed = _adapter_data(case)
    b = t["y"][0] if case.shapes[0][0] % 2 else None  # of the output's size, and strided where the case is
    with poisoned(run, []):
        y, A = run["adapter_product"](t["x"], b, t["U"], t["S"], t["Vt"], s, case.dropout, seed)
    term, exact_A = adapter.adapter_forward(exact["x"], exact["U"], exact["S"], exact["Vt"], s, case.dropout, seed)
    yield "y", relative(y, term if b is None else term + b.double()), _adapter_tolerance(case)
    yield "A", relative(A, exact_A), _adapter_tolerance(case)


def backward(case: Case, run: Implementation) -> Measures:
    t, exact, s, seed = _adapter_data(case)
    factors = exact["U"], exact["S"], exact["Vt"]
    A = adapter.adapter_forward(exact["x"], *factors, s, case.dropout, seed)[1].to(case.dtype)
    grad_x = torch.full(t["x"].shape, math.nan, dtype=case.dtype)
    with poisoned(run, []):
        grads = run["adapter_backward_"](
            grad_x, 0.0, t["y"], t["x"], A, t["U"], t["S"], t["Vt"], s, case.dropout, seed, [True] * 3
        )
    wanted = adapter.adapter_backward(exact["y"], exact["x"], *factors, s, case.dropout, seed)
    got = (grad_x, *grads)
    for name, value, right in zip(wanted._fields, got, wanted, strict=True):
        yield f"gradient of {name}", relative(value, right), _adapter_tolerance(case)


def dropout(case: Case, run: Implementation) -> Measures:
    x, _ = store(gaussian(case, case.shapes[0], case.generator()), case)
    seed = torch.tensor(zlib.crc32(case.name.encode()) << 20)
    with poisoned(run, []):
        kept = run["philox_dropout"](x, case.dropout, seed)
    exact = philox.dropout(x.double(), case.dropout, seed)
    yield "value", relative(kept, exact), 2 * round_off(case.dtype)[0]  # the scale and the product are rounded
    yield "mask", float(((kept != 0) != (exact != 0)).sum()), 0.0

"""Schemas of the operators, their shapes under tracing, and the reference that serves where no native kernel does.

The reference is registered as ``CompositeExplicitAutograd``; a native library that is loaded takes over for its
own dispatch key (``backends.py`` decides which are loaded). Importing this module compiles nothing.

Operators over many factors take tensor lists, each tensor seen as (n, r): a factor stored transposed, (r, n),
comes as its ``.mT`` view and is never copied to transpose it.

``info`` is a (k, 4) float64 CPU tensor, a row for each matrix or factor: status, residual, iterations, path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import stiefel

STATUS_OK = 0
STATUS_NON_FINITE = 1
STATUS_NOT_CONVERGED = 2

PATH_NEWTON_SCHULZ = 0
PATH_FLOAT64_GRAM = 1
PATH_SVD = 2

INFO_COLUMNS = 4

_library = torch.library.Library("stella_kernels", "DEF")

_library.define("polar(Tensor M, str method) -> (Tensor, Tensor)")
_library.define("riemannian_gradient_(Tensor(a!)[] gradients, Tensor[] factors) -> Tensor")
_library.define("project_retract_(Tensor(a!)[] moved, Tensor[] previous, float[] divisors, str method) -> Tensor")


def _info(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, INFO_COLUMNS)


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@torch.library.impl(_library, "polar", "CompositeExplicitAutograd")
def _polar_reference(M: Tensor, method: str) -> tuple[Tensor, Tensor]:
    n, r = M.shape[-2:]
    wide = M.to(_arithmetic_dtype(M.dtype))
    batch = wide.reshape(-1, n, r)  # (B, n, r)
    finite = batch.isfinite().flatten(1).all(1) if batch.numel() else torch.ones(batch.shape[0], dtype=torch.bool)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise RuntimeError(
            f"polar: matrix {index} of M holds NaN or an infinity; the orthogonal polar factor is not defined for it. "
            "Check the values that were passed in."
        )
    Q = stiefel.polar_factor(batch)
    residual = stiefel.orthonormality_error(Q)
    info = _info([[STATUS_OK, float(e), 0.0, PATH_SVD] for e in residual])
    return Q.reshape(M.shape).to(M.dtype), info


@torch.library.register_fake("stella_kernels::polar", lib=_library)
def _polar_fake(M: Tensor, method: str) -> tuple[Tensor, Tensor]:
    batch = 1
    for size in M.shape[:-2]:
        batch = batch * size
    Q = torch.empty_like(M, memory_format=torch.contiguous_format)
    return Q, M.new_empty((batch, INFO_COLUMNS), dtype=torch.float64, device="cpu")


@torch.library.impl(_library, "riemannian_gradient_", "CompositeExplicitAutograd")
def _riemannian_gradient_reference(gradients: list[Tensor], factors: list[Tensor]) -> Tensor:
    finite = [bool(g.isfinite().all()) and bool(y.isfinite().all()) for g, y in zip(gradients, factors, strict=True)]
    info = _info([[STATUS_OK if ok else STATUS_NON_FINITE, 0.0, 0.0, 0.0] for ok in finite])
    if not all(finite):
        return info
    for gradient, factor in zip(gradients, factors, strict=True):
        wide = _arithmetic_dtype(gradient.dtype)
        gradient.copy_(stiefel.riemannian_gradient(factor.to(wide), gradient.to(wide)))
    return info


@torch.library.register_fake("stella_kernels::riemannian_gradient_", lib=_library)
def _riemannian_gradient_fake(gradients: list[Tensor], factors: list[Tensor]) -> Tensor:
    return torch.empty((len(gradients), INFO_COLUMNS), dtype=torch.float64)


@torch.library.impl(_library, "project_retract_", "CompositeExplicitAutograd")
def _project_retract_reference(
    moved: list[Tensor], previous: list[Tensor], divisors: list[float], method: str
) -> Tensor:
    rows: list[list[float]] = []
    for new, old, divisor in zip(moved, previous, divisors, strict=True):
        if not (bool(new.isfinite().all()) and bool(old.isfinite().all())):
            rows.append([STATUS_NON_FINITE, float("nan"), 0.0, 0.0])
            continue
        wide = _arithmetic_dtype(new.dtype)
        Q = stiefel.project_retract(old.to(wide), new.to(wide), divisor, "polar")
        rows.append([STATUS_OK, float(stiefel.orthonormality_error(Q)), 0.0, PATH_SVD])
        new.copy_(Q)
    return _info(rows)


@torch.library.register_fake("stella_kernels::project_retract_", lib=_library)
def _project_retract_fake(moved: list[Tensor], previous: list[Tensor], divisors: list[float], method: str) -> Tensor:
    return torch.empty((len(moved), INFO_COLUMNS), dtype=torch.float64)

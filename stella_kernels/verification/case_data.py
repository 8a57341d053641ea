"""What the table of cases is run on: data from a case's own seed, stored as it asks, with NaN wherever it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .case_table import Case

Implementation = dict[str, Callable[..., Any]]  # operator -> what runs it
Measures = Iterator[tuple[str, float, float]]  # what, error, tolerance


def safety(dtype: torch.dtype) -> float:
    """A few round-offs of each of a handful of operations; in float64 those of the reference and the check as well."""
    return 32.0 if dtype == torch.float64 else 8.0


def gaussian(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthonormal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q


def with_singular_values(shape: tuple[int, ...], values: Tensor, generator: torch.Generator) -> Tensor:
    r = shape[-1]
    right = orthonormal((*shape[:-2], r, r), generator)
    return (orthonormal(shape, generator) * values) @ right.mT


def matrix(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The float64 matrix that ``kind`` names, before scaling and rounding."""
    r = shape[-1]
    if case.kind.startswith("condition"):
        decades = math.log10(float(case.kind.removeprefix("condition")))
        values = torch.logspace(0, -decades, r, dtype=torch.float64)
        return with_singular_values(shape, values, generator)
    if case.kind == "rank-deficient":  # exactly, also after rounding: columns repeat, and one is zero
        M = gaussian(case, shape, generator)
        M[..., r // 2 :] = M[..., : r - r // 2]
        M[..., 0] = 0.0
        return M
    if case.kind == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if case.kind == "graded":  # columns from 1 down to 1e-4
        return gaussian(case, shape, generator) * torch.logspace(0, -4, r, dtype=torch.float64)
    if case.kind.startswith("apart"):  # one column, and orthogonal to it all others, this much shorter
        M = gaussian(case, shape, generator) * float(case.kind.removeprefix("apart")) / math.sqrt(shape[-2])
        M[..., 0, :], M[..., 0] = 0.0, 0.0
        M[..., 0, 0] = 1.0
        return M
    if case.kind == "orthonormal":
        return orthonormal(shape, generator)
    if case.kind == "near-orthonormal":
        noise = gaussian(case, shape, generator) / math.sqrt(shape[-2])
        return orthonormal(shape, generator) + 0.05 * noise
    return gaussian(case, shape, generator)


def store(value: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """``value`` in the case's dtype and storage, and the buffer it is a view of: NaN where the view is not."""
    n, r = value.shape[-2:]
    lead = value.shape[:-2]
    if case.storage == "strided":
        buffer = torch.full((*lead, 2 * n + 3, 3 * r + 2), math.nan, dtype=case.dtype)
        view = buffer[..., 1 : 2 * n + 1 : 2, 2 : 3 * r + 2 : 3]
    elif case.storage == "columns":
        buffer = torch.full((*lead, r, n), math.nan, dtype=case.dtype)
        view = buffer.mT
    else:
        buffer = torch.full((*lead, n, r), math.nan, dtype=case.dtype)
        view = buffer
    view.copy_(value)
    return view, buffer


def written_outside(view: Tensor, buffer: Tensor) -> float:
    """Number of elements of the buffer outside the view that no longer hold their NaN."""
    return float((~buffer.isnan()).sum() - (~view.isnan()).sum())


def round_off(dtype: torch.dtype) -> tuple[float, float]:
    """Unit round-off of the storage and of the arithmetic."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps / 2, torch.finfo(arithmetic).eps / 2


def norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value.double()))


def relative(value: Tensor, exact: Tensor) -> float:
    size = norm(exact)
    return norm(value.double() - exact) / (size if size > 0.0 else 1.0)


@contextmanager
def poisoned(implementation: Implementation, matrices: list[Tensor]) -> Iterator[None]:
    """Uninitialised tensors are born NaN, and the kernels' own scratch is left full of NaN by a call on NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        poison = [torch.full_like(M, math.nan, memory_format=torch.contiguous_format) for M in matrices]
        if poison:
            implementation["project_retract_"](poison, [M.clone() for M in poison], [1.0] * len(poison), "auto")
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

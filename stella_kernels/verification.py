"""The judgement of every backend against the float64 reference, over the one table of cases (case_table.py).

A case makes its data from its own seed, stores it as asked, poisons memory with NaN, runs one operator of one backend
and compares. ``python -m stella_kernels verify`` and the tests run the same table. A new backend is one more entry of
:func:`implementations`; a new operator is a runner in ``_RUNNERS`` and its rows in the table.

Tolerances, with u the unit round-off of the storage dtype and w that of the arithmetic (float32 for half types):
storing the result costs u, whatever computes it. A stable algorithm commits a backward error of about w sqrt(r) of the
data's norm (sums of r products, round-offs of random sign: Higham and Mary 2019); a polar factor moves by at most
1/σ_min of that (2/(σ_i + σ_j): Higham, Functions of Matrices, 2008, theorem 8.9), hence the condition number.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .case_table import Case
from .reference import adapter, philox, stiefel

Implementation = dict[str, Callable[..., Any]]  # operator -> what runs it


def _safety(dtype: torch.dtype) -> float:
    """A few round-offs of each of a handful of operations; in float64 those of the reference and the check as well."""
    return 32.0 if dtype == torch.float64 else 8.0


@dataclass(frozen=True)
class Result:
    """The worst measure of a case: ``what`` was compared, its error, and the tolerance it is held to."""

    case: Case
    backend: str
    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN does not pass

    @property
    def ratio(self) -> float:
        if self.error == 0.0:
            return 0.0
        return self.error / self.tolerance if self.tolerance and not math.isnan(self.error) else math.inf


Measures = Iterator[tuple[str, float, float]]  # what, error, tolerance


def implementations() -> dict[str, Implementation]:
    """The backends that serve on this machine, best first, each with the operators it has."""
    found: dict[str, Implementation] = {}
    if backends.serving("polar") == "cpu":
        found["cpu"] = {name: getattr(torch.ops.stella_kernels, name) for name in backends.NATIVE_OPERATORS}
    found["reference"] = dict(ops.REFERENCE)
    return found


# ---- data ------------------------------------------------------------------------------------------------------------


def _gaussian(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _orthonormal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q


def _with_singular_values(shape: tuple[int, ...], values: Tensor, generator: torch.Generator) -> Tensor:
    r = shape[-1]
    right = _orthonormal((*shape[:-2], r, r), generator)
    return (_orthonormal(shape, generator) * values) @ right.mT


def _matrix(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The float64 matrix that ``kind`` names, before scaling and rounding."""
    r = shape[-1]
    if case.kind.startswith("condition"):
        decades = math.log10(float(case.kind.removeprefix("condition")))
        values = torch.logspace(0, -decades, r, dtype=torch.float64)
        return _with_singular_values(shape, values, generator)
    if case.kind == "rank-deficient":  # exactly, also after rounding: columns repeat, and one is zero
        M = _gaussian(case, shape, generator)
        M[..., r // 2 :] = M[..., : r - r // 2]
        M[..., 0] = 0.0
        return M
    if case.kind == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if case.kind == "graded":  # columns from 1 down to 1e-4
        return _gaussian(case, shape, generator) * torch.logspace(0, -4, r, dtype=torch.float64)
    if case.kind == "orthonormal":
        return _orthonormal(shape, generator)
    if case.kind == "near-orthonormal":
        noise = _gaussian(case, shape, generator) / math.sqrt(shape[-2])
        return _orthonormal(shape, generator) + 0.05 * noise
    return _gaussian(case, shape, generator)


def _store(value: Tensor, case: Case) -> tuple[Tensor, Tensor]:
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


def _written_outside(view: Tensor, buffer: Tensor) -> float:
    """Number of elements of the buffer outside the view that no longer hold their NaN."""
    return float((~buffer.isnan()).sum() - (~view.isnan()).sum())


def _round_off(dtype: torch.dtype) -> tuple[float, float]:
    """Unit round-off of the storage and of the arithmetic."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps / 2, torch.finfo(arithmetic).eps / 2


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value.double()))


def _relative(value: Tensor, exact: Tensor) -> float:
    size = _norm(exact)
    return _norm(value.double() - exact) / (size if size > 0.0 else 1.0)


@contextmanager
def _poisoned(implementation: Implementation, matrices: list[Tensor]) -> Iterator[None]:
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


# ---- one runner for each operator ------------------------------------------------------------------------------------


def _polar(case: Case, run: Implementation) -> Measures:
    M64 = case.scale * _matrix(case, case.shapes[0], case.generator())
    M, _ = _store(M64, case)
    before = M.clone()
    with _poisoned(run, list(M.reshape(-1, *M.shape[-2:]))):
        Q, info = run["polar"](M, case.method)
    u, w = _round_off(case.dtype)
    r = M.shape[-1]
    yield "input changed", float((before != M).sum()), 0.0
    yield "status", float(info[:, 0].abs().sum()), 0.0
    if M.numel() == 0:
        yield "shape", float(Q.shape != M.shape), 0.0
        return
    exact_input = M.double() / float(M.double().abs().max().clamp_min(1e-300))  # uf(cM) = uf(M): keep float64 in range
    left, values, right = torch.linalg.svd(exact_input, full_matrices=False)  # (..., n, r), (..., r), (..., r, r)
    stored = Q.double()
    # Laws, for any M: each holds to the backward error, without the condition number.
    law = 2 * u + _safety(case.dtype) * w * math.sqrt(r)
    H = stored.mT @ exact_input
    size = torch.linalg.matrix_norm(exact_input).clamp_min(1e-300)
    yield "orthonormality", float(stiefel.orthonormality_error(stored).max()) / math.sqrt(r), law
    yield "symmetry", float((torch.linalg.matrix_norm(H - H.mT) / size).max()), law
    yield "definiteness", float((-torch.linalg.eigvalsh(stiefel.symm(H))[..., 0] / size).max().clamp_min(0.0)), law
    yield "range", float((torch.linalg.matrix_norm(stored @ H - exact_input) / size).max()), law
    condition = float((values[..., 0] / values[..., -1]).nan_to_num(math.inf).max())
    if condition * w < 1e-2:  # else the factor is not determined by the data
        yield "value", _relative(Q, left @ right), u + _safety(case.dtype) * w * math.sqrt(r) * condition
    # The report is of Q before it is stored in a shorter type: measured, or a bound with condition numbers of up to 16.
    if case.dtype in (torch.float32, torch.float64):
        measured, reported = stiefel.orthonormality_error(stored).flatten(), info[:, 1]
        yield "residual above the reported", float((measured - reported).max().clamp_min(0.0)) / math.sqrt(r), law
        yield "reported residual", float(reported.max()) / math.sqrt(r), law + (2 + 4 * 16) * w


def _gradient(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    factors = [_store(_orthonormal(shape, generator), case) for shape in case.shapes]
    gradients = []
    for (Y, _), shape in zip(factors, case.shapes, strict=True):
        G = case.scale * _gaussian(case, shape, generator)
        if case.kind == "aligned":  # in the span of Y: everything but the skew part cancels
            G = Y.double() @ G[: shape[-1]]
        gradients.append(_store(G, case))
    before = [(G.clone(), Y.clone()) for (G, _), (Y, _) in zip(gradients, factors, strict=True)]
    snapshots = [torch.full_like(Y, math.nan) for Y, _ in factors]
    with _poisoned(run, [G for G, _ in gradients]):
        info = run["riemannian_gradient_"]([G for G, _ in gradients], [Y for Y, _ in factors], snapshots)
    u, w = _round_off(case.dtype)
    yield "status", float(info[:, 0].abs().sum()), 0.0
    for (G, buffer), (Y, _), (G0, Y0) in zip(gradients, factors, before, strict=True):
        exact = stiefel.riemannian_gradient(Y0.double(), G0.double())
        # Y(∇ᵀY) has norm at most ‖∇‖: the error is relative to that, whatever cancels.
        error = _norm(G.double() - exact) / max(_norm(G0), 1e-300)
        yield "value", error, u + _safety(case.dtype) * w * math.sqrt(G.shape[-1])
        yield "factor changed", float((Y != Y0).sum()), 0.0
        yield "written outside", _written_outside(G, buffer), 0.0
    for snapshot, (_, Y0) in zip(snapshots, before, strict=True):
        yield "snapshot", float((snapshot != Y0).sum()), 0.0


def _retract(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    previous, moved = [], []
    for shape in case.shapes:
        Y, buffer = _store(_orthonormal(shape, generator), case)
        step = _gaussian(case, shape, generator)
        if case.kind == "one-column" and shape[-1] > 1:  # σ_min(M) stays 1 while ‖M‖ grows: the condition is the step
            step[:, 1:] = 0.0
        step = case.scale * case.divisor * step / torch.linalg.vector_norm(step, dim=0).clamp_min(1e-300)
        previous.append((Y, buffer))
        moved.append(_store(Y.double() + step, case))
    before = [(new.clone(), old.clone()) for (new, _), (old, _) in zip(moved, previous, strict=True)]
    with _poisoned(run, [M for M, _ in moved]):
        info = run["project_retract_"](
            [M for M, _ in moved], [Y for Y, _ in previous], [case.divisor] * len(moved), case.method
        )
    u, w = _round_off(case.dtype)
    yield "status", float(info[:, 0].abs().sum()), 0.0
    for (Q, buffer), (Y, _), (M0, Y0) in zip(moved, previous, before, strict=True):
        r = Q.shape[-1]
        old, delta = Y0.double(), (M0.double() - Y0.double()) / case.divisor
        M = old + stiefel.tangent_projection(old, delta)
        left, values, right = torch.linalg.svd(M, full_matrices=False)
        # M is a sum of terms of norm up to ‖Y‖ + ‖Δ‖, some of which cancel: their round-off over σ_min(M).
        amplification = (1.0 + float(torch.linalg.matrix_norm(delta, 2))) / float(values[-1])
        yield "value", _relative(Q, left @ right), u + _safety(case.dtype) * w * math.sqrt(r) * amplification
        law = 2 * u + _safety(case.dtype) * w * math.sqrt(r) * min(
            amplification, 16.0
        )  # past that the path is float64's
        yield "orthonormality", float(stiefel.orthonormality_error(Q.double())) / math.sqrt(r), law
        yield "previous changed", float((Y != Y0).sum()), 0.0
        yield "written outside", _written_outside(Q, buffer), 0.0


def _adapter_data(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], float, Tensor | None]:
    """Stored tensors, the same in float64, s and the seed of dropout. Factors are float32 masters or wider."""
    T, m, n, r = case.shapes[0]
    generator = case.generator()
    masters = torch.float64 if case.dtype == torch.float64 else torch.float32
    S = torch.randn((r,) if case.diagonal else (r, r), generator=generator, dtype=torch.float64)
    activations = {
        name: torch.randn(T, k, generator=generator, dtype=torch.float64) for name, k in (("x", n), ("y", m))
    }
    factors = {"U": _orthonormal((m, r), generator), "S": S, "Vt": _orthonormal((n, r), generator).mT.contiguous()}
    stored = {name: _store(value, case)[0] for name, value in activations.items()}
    stored |= {name: value.to(masters) for name, value in factors.items()}
    seed = torch.tensor(zlib.crc32(case.name.encode()) << 20) if case.dropout else None
    return stored, {name: value.double().clone() for name, value in stored.items()}, 1.7, seed


def _adapter_tolerance(case: Case) -> float:
    """Five roundings to the storage type (factors, A, P or Q and K, the result), and sums of up to max(T, m, n)."""
    u, w = _round_off(case.dtype)
    return _safety(case.dtype) * (u + w * math.sqrt(max(case.shapes[0])))


def _adapter_forward(case: Case, run: Implementation) -> Measures:
    t, exact, s, seed = _adapter_data(case)
    with _poisoned(run, []):
        A = run["adapter_forward_"](t["y"], t["x"], t["U"], t["S"], t["Vt"], s, case.dropout, seed)
    factors = exact["U"], exact["S"], exact["Vt"]
    term, exact_A = adapter.adapter_forward(exact["x"], *factors, s, case.dropout, seed)
    yield "y", _relative(t["y"], exact["y"] + term), _adapter_tolerance(case)
    yield "A", _relative(A, exact_A), _adapter_tolerance(case)


def _adapter_backward(case: Case, run: Implementation) -> Measures:
    t, exact, s, seed = _adapter_data(case)
    factors = exact["U"], exact["S"], exact["Vt"]
    A = adapter.adapter_forward(exact["x"], *factors, s, case.dropout, seed)[1].to(case.dtype)
    grad_x = torch.full(t["x"].shape, math.nan, dtype=case.dtype)
    with _poisoned(run, []):
        grads = run["adapter_backward_"](
            grad_x, 0.0, t["y"], t["x"], A, t["U"], t["S"], t["Vt"], s, case.dropout, seed, [True] * 3
        )
    wanted = adapter.adapter_backward(exact["y"], exact["x"], *factors, s, case.dropout, seed)
    got = (grad_x, *grads)
    for name, value, right in zip(wanted._fields, got, wanted, strict=True):
        yield f"gradient of {name}", _relative(value, right), _adapter_tolerance(case)


def _dropout(case: Case, run: Implementation) -> Measures:
    x, _ = _store(_gaussian(case, case.shapes[0], case.generator()), case)
    seed = torch.tensor(zlib.crc32(case.name.encode()) << 20)
    with _poisoned(run, []):
        kept = run["philox_dropout"](x, case.dropout, seed)
    exact = philox.dropout(x.double(), case.dropout, seed)
    yield "value", _relative(kept, exact), 2 * _round_off(case.dtype)[0]  # the scale and the product are rounded
    yield "mask", float(((kept != 0) != (exact != 0)).sum()), 0.0


_RUNNERS: dict[str, Callable[[Case, Implementation], Measures]] = {
    "polar": _polar,
    "riemannian_gradient_": _gradient,
    "project_retract_": _retract,
    "adapter_forward_": _adapter_forward,
    "adapter_backward_": _adapter_backward,
    "philox_dropout": _dropout,
}


def measures(case: Case, implementation: Implementation) -> list[tuple[str, float, float]]:
    """Every comparison of a case: what, error, tolerance."""
    return list(_RUNNERS[case.operator](case, implementation))


def check(case: Case, backend: str, implementation: Implementation) -> Result:
    """The comparison nearest to, or furthest past, its tolerance; an exception of the operator is an infinite error."""
    try:
        results = [Result(case, backend, *measure) for measure in measures(case, implementation)]
    except (RuntimeError, ValueError, TypeError) as error:
        return Result(case, backend, f"raised {type(error).__name__}: {error}", math.inf, 0.0)
    missed = [result for result in results if not result.passed]
    return missed[0] if missed else max(results, key=lambda result: result.ratio)

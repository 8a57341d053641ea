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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import backends, ops, triton_backend
from .case_data import (
    Implementation,
    gaussian,
    matrix,
    norm,
    orthonormal,
    poisoned,
    relative,
    round_off,
    safety,
    store,
    written_outside,
)
from .case_table import STORAGES, Case
from .reference import adamw, adapter, philox, stiefel


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
    if backends.serving("polar", "cuda") == "triton":
        found["triton"] = {name: triton_backend.on("cuda", f) for name, f in triton_backend.operators().items()}
    found["reference"] = dict(ops.REFERENCE)
    return found


# ---- one runner for each operator ------------------------------------------------------------------------------------


def _polar(case: Case, run: Implementation) -> Measures:
    M64 = case.scale * matrix(case, case.shapes[0], case.generator())
    M, _ = store(M64, case)
    before = M.clone()
    with poisoned(run, list(M.reshape(-1, *M.shape[-2:]))):
        Q, info = run["polar"](M, case.method)
    u, w = round_off(case.dtype)
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
    law = 2 * u + safety(case.dtype) * w * math.sqrt(r)
    H = stored.mT @ exact_input
    size = torch.linalg.matrix_norm(exact_input).clamp_min(1e-300)
    yield "orthonormality", float(stiefel.orthonormality_error(stored).max()) / math.sqrt(r), law
    yield "symmetry", float((torch.linalg.matrix_norm(H - H.mT) / size).max()), law
    yield "definiteness", float((-torch.linalg.eigvalsh(stiefel.symm(H))[..., 0] / size).max().clamp_min(0.0)), law
    yield "range", float((torch.linalg.matrix_norm(stored @ H - exact_input) / size).max()), law
    condition = float((values[..., 0] / values[..., -1]).nan_to_num(math.inf).max())
    if condition * w < 1e-2:  # else the factor is not determined by the data
        yield "value", relative(Q, left @ right), u + safety(case.dtype) * w * math.sqrt(r) * condition
    # The report is of Q before it is stored in a shorter type: measured, or a bound with condition numbers of up to 16.
    if case.dtype in (torch.float32, torch.float64):
        measured, reported = stiefel.orthonormality_error(stored).flatten(), info[:, 1]
        yield "residual above the reported", float((measured - reported).max().clamp_min(0.0)) / math.sqrt(r), law
        yield "reported residual", float(reported.max()) / math.sqrt(r), law + (2 + 4 * 16) * w


def _gradient(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    factors = [store(orthonormal(shape, generator), case) for shape in case.shapes]
    gradients = []
    for (Y, _), shape in zip(factors, case.shapes, strict=True):
        G = case.scale * gaussian(case, shape, generator)
        if case.kind == "aligned":  # in the span of Y: everything but the skew part cancels
            G = Y.double() @ G[: shape[-1]]
        gradients.append(store(G, case))
    before = [(G.clone(), Y.clone()) for (G, _), (Y, _) in zip(gradients, factors, strict=True)]
    snapshots = [torch.full_like(Y, math.nan) for Y, _ in factors]
    with poisoned(run, [G for G, _ in gradients]):
        info = run["riemannian_gradient_"]([G for G, _ in gradients], [Y for Y, _ in factors], snapshots)
    u, w = round_off(case.dtype)
    yield "status", float(info[:, 0].abs().sum()), 0.0
    for (G, buffer), (Y, _), (G0, Y0) in zip(gradients, factors, before, strict=True):
        exact = stiefel.riemannian_gradient(Y0.double(), G0.double())
        # Y(∇ᵀY) has norm at most ‖∇‖: the error is relative to that, whatever cancels.
        error = norm(G.double() - exact) / max(norm(G0), 1e-300)
        yield "value", error, u + safety(case.dtype) * w * math.sqrt(G.shape[-1])
        yield "factor changed", float((Y != Y0).sum()), 0.0
        yield "written outside", written_outside(G, buffer), 0.0
    for snapshot, (_, Y0) in zip(snapshots, before, strict=True):
        yield "snapshot", float((snapshot != Y0).sum()), 0.0


def _retract(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    previous, moved = [], []
    for shape in case.shapes:
        Y, buffer = store(orthonormal(shape, generator), case)
        step = gaussian(case, shape, generator)
        if case.kind == "one-column" and shape[-1] > 1:  # σ_min(M) stays 1 while ‖M‖ grows: the condition is the step
            step[:, 1:] = 0.0
        step = case.scale * case.divisor * step / torch.linalg.vector_norm(step, dim=0).clamp_min(1e-300)
        previous.append((Y, buffer))
        moved.append(store(Y.double() + step, case))
    before = [(new.clone(), old.clone()) for (new, _), (old, _) in zip(moved, previous, strict=True)]
    with poisoned(run, [M for M, _ in moved]):
        info = run["project_retract_"](
            [M for M, _ in moved], [Y for Y, _ in previous], [case.divisor] * len(moved), case.method
        )
    u, w = round_off(case.dtype)
    yield "status", float(info[:, 0].abs().sum()), 0.0
    for (Q, buffer), (Y, _), (M0, Y0) in zip(moved, previous, before, strict=True):
        r = Q.shape[-1]
        old, delta = Y0.double(), (M0.double() - Y0.double()) / case.divisor
        M = old + stiefel.tangent_projection(old, delta)
        left, values, right = torch.linalg.svd(M, full_matrices=False)
        # M is a sum of terms of norm up to ‖Y‖ + ‖Δ‖, some of which cancel: their round-off over σ_min(M).
        amplification = (1.0 + float(torch.linalg.matrix_norm(delta, 2))) / float(values[-1])
        yield "value", relative(Q, left @ right), u + safety(case.dtype) * w * math.sqrt(r) * amplification
        law = 2 * u + safety(case.dtype) * w * math.sqrt(r) * min(
            amplification, 16.0
        )  # past that the path is float64's
        yield "orthonormality", float(stiefel.orthonormality_error(Q.double())) / math.sqrt(r), law
        yield "previous changed", float((Y != Y0).sum()), 0.0
        yield "written outside", written_outside(Q, buffer), 0.0


@dataclass(frozen=True)
class _AdamwInput:
    """One factor's arguments of stella_adamw_, as stored; ``buffers`` are those of the factor and the moments."""

    tensors: dict[str, Tensor]  # 'Y', 'gradient', 'm', 'v'
    buffers: dict[str, Tensor]
    coupling: Tensor
    settings: dict[str, float]  # the operator's hyperparameters by name, in its order

    def exact_move(self) -> tuple[Tensor, Tensor, Tensor]:
        Y, gradient, m, v = (self.tensors[name].double() for name in ("Y", "gradient", "m", "v"))
        K = self.coupling.double() if self.coupling.numel() else None
        return adamw.adamw_move(Y, gradient, m, v, coupling=K, **self.settings)


def _adamw_input(case: Case, index: int, generator: torch.Generator) -> _AdamwInput:
    """Moments of the gradient's own size, every v away from 0, and the learning rate of columns of length ``scale``."""
    shape = case.shapes[index]
    size = float(case.kind.removeprefix("gradient")) if case.kind.startswith("gradient") else 1.0
    first = case.kind == "first"  # step 1, from moments that are 0
    values = {
        "Y": orthonormal(shape, generator),
        "gradient": size * gaussian(case, shape, generator),
        "m": (0.0 if first else 0.3 * size) * gaussian(case, shape, generator),
        "v": (0.0 if first else size * size) * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)),
    }
    tensors, buffers = {}, {}
    for place, (name, value) in enumerate(values.items()):
        storage = STORAGES[(index + place) % 3] if case.kind == "storages" else case.storage
        tensors[name], buffers[name] = store(value, replace(case, storage=storage))
    given = index if case.kind != "coupled" else index % 2 + 1
    coupling = tensors["Y"].new_empty(0)
    if given % 3:  # computed by the operator, given in the arithmetic's dtype, given in float64
        coupling = tensors["gradient"].double().mT @ tensors["Y"].double()
        arithmetic = torch.float64 if case.dtype == torch.float64 else torch.float32
        coupling = coupling.to(arithmetic if given % 3 == 1 else torch.float64)
    settings = {"lr": 1.0, "beta1": (0.9, 0.8)[index % 2], "beta2": (0.999, 0.95)[index % 2]}
    settings |= {"eps": _FIRST_EPS if first else 1e-8 * size, "step": 1.0 if first else 3.0 + index}
    settings |= {"divisor": case.divisor, "sign": (1.0, -1.0)[index % 2]}
    unit = _AdamwInput(tensors, buffers, coupling, settings).exact_move()[0]
    settings["lr"] = case.scale / max(float(torch.linalg.vector_norm(unit, dim=0).max()), 1e-300)
    return _AdamwInput(tensors, buffers, coupling, settings)


_FIRST_EPS = 1e-2


def _adamw_tolerances(case: Case, given: _AdamwInput, D: Tensor, m: Tensor, v: Tensor) -> dict[str, float]:
    """What m, v and D, exact here, may be off by, in Frobenius norm.

    g is off by w sqrt(r) of the gradient, as in :func:`_gradient`; m and v are sums of two terms, in which a change of
    g counts (1 − β₁) and 2 (1 − β₂) |g|. ``D = ρ m / (sqrt(v) c + ε)`` then changes, to first order, by ρ/(...) for a
    change of m and by at most |D|/(2 v) for one of v, beside a few w of its own. At the first step from zero moments
    both changes come from the same g: D = ρ' g / (|g| + ε), of slope at most ρ'/ε.
    """
    _, w = round_off(case.dtype)
    h, few = given.settings, safety(case.dtype) * w
    gradient = given.tensors["gradient"].double()
    off_g = few * math.sqrt(D.shape[-1]) * norm(gradient)
    off_m = (1 - h["beta1"]) * off_g + few * (norm(given.tensors["m"]) + norm(m))
    off_v = (1 - h["beta2"]) * 2 * float(gradient.abs().max()) * off_g + few * norm(v)
    rate = h["lr"] / h["divisor"]
    if case.kind == "first":
        off_D = rate / h["eps"] * off_g + few * norm(D)
    else:
        correction = math.sqrt(1 - h["beta2"] ** h["step"])
        slope = rate / (1 - h["beta1"] ** h["step"]) / (v.sqrt() / correction + h["eps"])
        off_D = float(slope.max()) * off_m + float((D.abs() / (2 * v)).max()) * off_v + few * norm(D)
    return {"m": off_m, "v": off_v, "D": off_D}


def _adamw_step(case: Case, given: _AdamwInput, before: dict[str, Tensor]) -> Measures:
    u, w = round_off(case.dtype)
    r = before["Y"].shape[-1]
    D, m, v = replace(given, tensors=before).exact_move()
    off = _adamw_tolerances(case, replace(given, tensors=before), D, m, v)
    for name, exact in (("m", m), ("v", v)):
        tolerance = u + off[name] / max(norm(exact), 1e-300)
        yield f"moment {name}", relative(given.tensors[name], exact), tolerance
    Y, Q = before["Y"].double(), given.tensors["Y"]
    left, values, right = torch.linalg.svd(Y + stiefel.tangent_projection(Y, D), full_matrices=False)
    # As in _retract; and what D is off by, twice for its projection, over σ_min.
    amplification = (1.0 + float(torch.linalg.matrix_norm(D, 2))) / float(values[-1])
    noise = safety(case.dtype) * w * math.sqrt(r)
    step = 2 * off["D"] / (float(values[-1]) * math.sqrt(r))
    yield "value", relative(Q, left @ right), u + noise * amplification + step
    law = 2 * u + noise * min(amplification, 16.0)
    yield "orthonormality", float(stiefel.orthonormality_error(Q.double())) / math.sqrt(r), law


def _adamw(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    inputs = [_adamw_input(case, index, generator) for index in range(len(case.shapes))]
    refused, skipping = case.kind == "refused", case.kind == "skipped"
    bad = [(refused or skipping) and (index % 2 == 1 or len(inputs) == 1) for index in range(len(inputs))]
    for is_bad, given in zip(bad, inputs, strict=True):
        if is_bad:
            given.tensors["gradient"][-1, -1] = math.nan
    before = [{name: tensor.clone() for name, tensor in given.tensors.items()} for given in inputs]
    rows = torch.tensor([list(given.settings.values()) for given in inputs], dtype=torch.float64)
    lists = [[given.tensors[name] for given in inputs] for name in ("Y", "gradient", "m", "v")]
    couplings = [given.coupling for given in inputs]
    with poisoned(run, lists[0]):
        nan = [torch.full_like(Y, math.nan) for Y in lists[0]]
        gradients = [torch.ones_like(Y) for Y in lists[0]]
        run["stella_adamw_"](nan, gradients, *([Y.clone() for Y in nan] for _ in "mv"), couplings, rows, False)
        info = run["stella_adamw_"](*lists, couplings, rows, skipping)
    yield "status", float((info[:, 0] - torch.tensor(bad, dtype=torch.float64)).abs().sum()), 0.0
    for is_bad, given, old in zip(bad, inputs, before, strict=True):
        fixed = ["gradient", *(("Y", "m", "v") if is_bad or refused else ())]
        changed = sum(float((given.tensors[n].nan_to_num(7.0) != old[n].nan_to_num(7.0)).sum()) for n in fixed)
        yield "written where nothing should be", changed, 0.0
        for name in ("Y", "m", "v"):
            yield f"written outside {name}", written_outside(given.tensors[name], given.buffers[name]), 0.0
        if len(fixed) == 1:
            yield from _adamw_step(case, given, old)


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


def _adapter_forward(case: Case, run: Implementation) -> Measures:
    t, exact, s, seed = _adapter_data(case)
    with poisoned(run, []):
        A = run["adapter_forward_"](t["y"], t["x"], t["U"], t["S"], t["Vt"], s, case.dropout, seed)
    factors = exact["U"], exact["S"], exact["Vt"]
    term, exact_A = adapter.adapter_forward(exact["x"], *factors, s, case.dropout, seed)
    yield "y", relative(t["y"], exact["y"] + term), _adapter_tolerance(case)
    yield "A", relative(A, exact_A), _adapter_tolerance(case)


def _adapter_product(case: Case, run: Implementation) -> Measures:
    t, exact, s, seed = _adapter_data(case)
    b = t["y"][0] if case.shapes[0][0] % 2 else None  # of the output's size, and strided where the case is
    with poisoned(run, []):
        y, A = run["adapter_product"](t["x"], b, t["U"], t["S"], t["Vt"], s, case.dropout, seed)
    term, exact_A = adapter.adapter_forward(exact["x"], exact["U"], exact["S"], exact["Vt"], s, case.dropout, seed)
    yield "y", relative(y, term if b is None else term + b.double()), _adapter_tolerance(case)
    yield "A", relative(A, exact_A), _adapter_tolerance(case)


def _adapter_backward(case: Case, run: Implementation) -> Measures:
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


def _dropout(case: Case, run: Implementation) -> Measures:
    x, _ = store(gaussian(case, case.shapes[0], case.generator()), case)
    seed = torch.tensor(zlib.crc32(case.name.encode()) << 20)
    with poisoned(run, []):
        kept = run["philox_dropout"](x, case.dropout, seed)
    exact = philox.dropout(x.double(), case.dropout, seed)
    yield "value", relative(kept, exact), 2 * round_off(case.dtype)[0]  # the scale and the product are rounded
    yield "mask", float(((kept != 0) != (exact != 0)).sum()), 0.0


_RUNNERS: dict[str, Callable[[Case, Implementation], Measures]] = {
    "polar": _polar,
    "riemannian_gradient_": _gradient,
    "project_retract_": _retract,
    "stella_adamw_": _adamw,
    "adapter_forward_": _adapter_forward,
    "adapter_product": _adapter_product,
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

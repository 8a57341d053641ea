"""The runners of the Stiefel operators: a case's data, one call, what is compared; tolerances as in ``judge.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..reference import adamw, stiefel
from .case_data import (
    Implementation,
    Measures,
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


def polar(case: Case, run: Implementation) -> Measures:
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
    measured = stiefel.orthonormality_error(stored).flatten().tolist()
    for exact, row in zip(measured, info.tolist(), strict=True):
        yield from _reported_residual(case, row, exact, (M.shape[-2], r))
    yield "drift", float(info[:, 4].abs().sum()), 0.0


def _reported_residual(case: Case, row: list[float], measured: float, shape: tuple[int, int]) -> Measures:
    """That a row of ``info`` reports a bound on what is stored, and not a wild one.

    From above: the rounding of Q to its storage, of relative size u (η = 2⁻²⁵ where float16 is subnormal), moves QᵀQ by
    up to 2 (u sqrt(r) + η sqrt(n r)); computing it costs w sqrt(r) (2 + 1.25 sqrt(r) + 8 κ), κ ≤ 16 of the Gram
    matrix (csrc/cpu/stiefel/residual.h); an SVD of float64 data leaves cosines of 2 w sqrt(r) between r columns.
    """
    u, w = round_off(case.dtype)
    n, r = shape
    least = 2.0**-25 if case.dtype == torch.float16 else 0.0
    own = _measurement(n, r) if case.dtype == torch.float64 else 0.01 * w
    yield "residual above the reported", max(0.0, measured - row[1]), own
    moved = u * math.sqrt(r) + least * math.sqrt(n * r)
    yield "reported residual", row[1], 2.1 * moved + moved**2 + w * math.sqrt(r) * (2 + 4 * math.sqrt(r) + 8 * 17)


def _measurement(n: int, r: int) -> float:
    """What a distance from orthonormal columns, measured in float64, may itself be off by."""
    return 2.0**-53 * (4 * r + math.sqrt(n))


def _reported_drift(row: list[float], Y: Tensor) -> tuple[str, float, float]:
    """The drift as reported against that of Y: both have a Gram matrix's round-off, of 8 eps sqrt(r) at most."""
    _, w = round_off(Y.dtype)
    n, r = Y.shape
    measured = float(stiefel.orthonormality_error(Y.double()))
    return "drift", abs(row[4] - measured), (16 * w * math.sqrt(r) + _measurement(n, r)) * (1.0 + measured)


def _point(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where a step starts: on the manifold, or of 'drifted' beside it."""
    Y = orthonormal(shape, generator)
    return Y + 0.01 / math.sqrt(shape[0]) * gaussian(case, shape, generator) if case.kind == "drifted" else Y


def _overflowing(Y: Tensor) -> Tensor:
    """A gradient of the largest values there are, whose Riemannian one is larger.

    Of one column y the signs are those of y but where |y_i| is the median: there y_i (∇ᵀy) has not the sign of ∇_i.
    """
    signs = Y.double().sign()
    middle = Y.double().abs().median(dim=0, keepdim=True).indices  # (1, r)
    signs.scatter_(0, middle, -signs.gather(0, middle))
    return torch.finfo(Y.dtype).max * signs


def _bad_ones(case: Case) -> list[bool]:
    """Which factors are made to fail: every other one, the only one of a list of one."""
    fails = case.kind in ("refused", "overflow")
    return [fails and (index % 2 == 1 or len(case.shapes) == 1) for index in range(len(case.shapes))]


def gradient(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    factors = [store(_point(case, shape, generator), case) for shape in case.shapes]
    gradients = []
    bad = _bad_ones(case)
    for (Y, _), shape, is_bad in zip(factors, case.shapes, bad, strict=True):
        G = case.scale * gaussian(case, shape, generator)
        if is_bad:
            G = _overflowing(Y)
        if case.kind == "aligned":  # in the span of Y: everything but the skew part cancels
            G = Y.double() @ G[: shape[-1]]
        gradients.append(store(G, case))
    before = [(G.clone(), Y.clone()) for (G, _), (Y, _) in zip(gradients, factors, strict=True)]
    snapshots = [torch.full_like(Y, math.nan) for Y, _ in factors]
    with poisoned(run, [G for G, _ in gradients]):
        info = run["riemannian_gradient_"]([G for G, _ in gradients], [Y for Y, _ in factors], snapshots)
    u, w = round_off(case.dtype)
    yield "status", float((info[:, 0] - torch.tensor([3.0 * b for b in bad], dtype=torch.float64)).abs().sum()), 0.0
    if any(bad):
        changed = sum(float((G != G0).sum()) for (G, _), (G0, _) in zip(gradients, before, strict=True))
        yield "written where nothing should be", changed, 0.0
        yield "snapshot where none should be", sum(float((~each.isnan()).sum()) for each in snapshots), 0.0
        return
    for row, (Y, _) in zip(info.tolist(), factors, strict=True):
        yield _reported_drift(row, Y)
    for (G, buffer), (Y, _), (G0, Y0) in zip(gradients, factors, before, strict=True):
        exact = stiefel.riemannian_gradient(Y0.double(), G0.double())
        # Y(∇ᵀY) has norm at most ‖∇‖: the error is relative to that, whatever cancels.
        error = norm(G.double() - exact) / max(norm(G0), 1e-300)
        yield "value", error, u + safety(case.dtype) * w * math.sqrt(G.shape[-1])
        yield "factor changed", float((Y != Y0).sum()), 0.0
        yield "written outside", written_outside(G, buffer), 0.0
    for snapshot, (_, Y0) in zip(snapshots, before, strict=True):
        yield "snapshot", float((snapshot != Y0).sum()), 0.0


def retract(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    previous, moved = [], []
    for shape in case.shapes:
        Y, buffer = store(_point(case, shape, generator), case)
        step = gaussian(case, shape, generator)
        if case.kind == "one-column" and shape[-1] > 1:  # σ_min(M) stays 1 while ‖M‖ grows: the condition is the step
            step[:, 1:] = 0.0
        step = case.scale * case.divisor * step / torch.linalg.vector_norm(step, dim=0).clamp_min(1e-300)
        if case.kind == "graded":
            step *= torch.logspace(0, -12, shape[-1], dtype=torch.float64)
        previous.append((Y, buffer))
        moved.append(store(Y.double() + step, case))
    before = [(new.clone(), old.clone()) for (new, _), (old, _) in zip(moved, previous, strict=True)]
    with poisoned(run, [M for M, _ in moved]):
        info = run["project_retract_"](
            [M for M, _ in moved], [Y for Y, _ in previous], [case.divisor] * len(moved), case.method
        )
    u, w = round_off(case.dtype)
    yield "status", float(info[:, 0].abs().sum()), 0.0
    for row, (Q, buffer), (Y, _), (M0, Y0) in zip(info.tolist(), moved, previous, before, strict=True):
        r = Q.shape[-1]
        yield from _reported_residual(case, row, float(stiefel.orthonormality_error(Q.double())), (Q.shape[0], r))
        yield _reported_drift(row, Y0)
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
        "Y": _point(case, shape, generator),
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


def _adamw_step(case: Case, row: list[float], given: _AdamwInput, before: dict[str, Tensor]) -> Measures:
    u, w = round_off(case.dtype)
    r = before["Y"].shape[-1]
    D, m, v = replace(given, tensors=before).exact_move()
    off = _adamw_tolerances(case, replace(given, tensors=before), D, m, v)
    for name, exact in (("m", m), ("v", v)):
        tolerance = u + off[name] / max(norm(exact), 1e-300)
        yield f"moment {name}", relative(given.tensors[name], exact), tolerance
    Y, Q = before["Y"].double(), given.tensors["Y"]
    yield from _reported_residual(case, row, float(stiefel.orthonormality_error(Q.double())), (Q.shape[0], r))
    yield _reported_drift(row, before["Y"])
    left, values, right = torch.linalg.svd(Y + stiefel.tangent_projection(Y, D), full_matrices=False)
    # As in _retract; and what D is off by, twice for its projection, over σ_min.
    amplification = (1.0 + float(torch.linalg.matrix_norm(D, 2))) / float(values[-1])
    noise = safety(case.dtype) * w * math.sqrt(r)
    step = 2 * off["D"] / (float(values[-1]) * math.sqrt(r))
    yield "value", relative(Q, left @ right), u + noise * amplification + step
    law = 2 * u + noise * min(amplification, 16.0)
    yield "orthonormality", float(stiefel.orthonormality_error(Q.double())) / math.sqrt(r), law


def adamw_step(case: Case, run: Implementation) -> Measures:
    generator = case.generator()
    inputs = [_adamw_input(case, index, generator) for index in range(len(case.shapes))]
    refused = case.kind == "refused"
    bad = _bad_ones(case)
    for is_bad, given in zip(bad, inputs, strict=True):
        if is_bad and refused:
            given.tensors["gradient"][-1, -1] = math.nan
        elif is_bad:
            given.tensors["gradient"].copy_(_overflowing(given.tensors["Y"]))
    before = [{name: tensor.clone() for name, tensor in given.tensors.items()} for given in inputs]
    rows = torch.tensor([list(given.settings.values()) for given in inputs], dtype=torch.float64)
    lists = [[given.tensors[name] for given in inputs] for name in ("Y", "gradient", "m", "v")]
    couplings = [given.coupling for given in inputs]
    with poisoned(run, lists[0]):
        nan = [torch.full_like(Y, math.nan) for Y in lists[0]]
        gradients = [torch.ones_like(Y) for Y in lists[0]]
        run["stella_adamw_"](nan, gradients, *([Y.clone() for Y in nan] for _ in "mv"), couplings, rows)
        info = run["stella_adamw_"](*lists, couplings, rows)
    status = torch.tensor(bad, dtype=torch.float64) * (1.0 if refused else 3.0)
    yield "status", float((info[:, 0] - status).abs().sum()), 0.0
    for row, given, old in zip(info.tolist(), inputs, before, strict=True):
        fixed = ["gradient", *(("Y", "m", "v") if any(bad) else ())]
        changed = sum(float((given.tensors[n].nan_to_num(7.0) != old[n].nan_to_num(7.0)).sum()) for n in fixed)
        yield "written where nothing should be", changed, 0.0
        for name in ("Y", "m", "v"):
            yield f"written outside {name}", written_outside(given.tensors[name], given.buffers[name]), 0.0
        if len(fixed) == 1:
            yield from _adamw_step(case, row, given, old)

"""The reference as an implementation of every operator: what serves where no native kernel does.

It is registered as ``CompositeExplicitAutograd``; a native library that is loaded takes over for its own dispatch key
(``backends.py``). What a kernel does not take, it passes on to the function here, whose arguments it has checked.
Nothing here is computed in autocast's dtype: an operator's dtypes are settled before it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import adamw, adapter, philox, stiefel
from ..reference.autocast import without_autocast
from . import arguments, phases, signatures
from .status import INFO_COLUMNS, PATH_SVD, STATUS_NON_FINITE, STATUS_OK, STATUS_OVERFLOW, arithmetic_dtype


def _info(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, INFO_COLUMNS)


def _residual(stored: Tensor) -> float:
    """``‖QᵀQ − I‖`` of what is stored, measured in float64."""
    return float(stiefel.orthonormality_error(stored.double()))


def polar(a: signatures.Polar) -> tuple[Tensor, Tensor]:
    *leading, n, r = a.M.shape
    wide = a.M.to(arithmetic_dtype(a.M.dtype))
    batch = wide.reshape(math.prod(leading), n, r)  # (B, n, r)
    finite = batch.isfinite().flatten(1).all(1) if batch.numel() else torch.ones(batch.shape[0], dtype=torch.bool)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise RuntimeError(
            f"polar: matrix {index} of M holds NaN or an infinity; the orthogonal polar factor is not defined for it. "
            "Check the values that were passed in."
        )
    Q = stiefel.polar_factor(batch).to(a.M.dtype)
    residual = stiefel.orthonormality_error(Q.double())
    info = _info([[STATUS_OK, float(e), 0.0, PATH_SVD, 0.0] for e in residual])
    return Q.reshape(a.M.shape), info


def _refused(finite: list[bool]) -> Tensor:
    """What an operator says of gradients of which one is not finite: nothing was computed."""
    return _info([[STATUS_OK if ok else STATUS_NON_FINITE, math.nan, 0.0, 0.0, math.nan] for ok in finite])


def riemannian_gradient_(a: signatures.RiemannianGradient) -> Tensor:
    finite = [bool(gradient.isfinite().all()) for gradient in a.gradients]
    if not all(finite):
        return _refused(finite)
    rows: list[list[float]] = []
    results: list[Tensor | None] = []
    for gradient, factor in zip(a.gradients, a.factors, strict=True):
        wide = arithmetic_dtype(gradient.dtype)
        result = stiefel.riemannian_gradient(factor.to(wide), gradient.to(wide)).to(gradient.dtype)
        status = STATUS_NON_FINITE if not bool(factor.isfinite().all()) else STATUS_OK
        if status == STATUS_OK and not bool(result.isfinite().all()):
            status = STATUS_OVERFLOW
        rows.append([status, 0.0, 0.0, 0.0, _residual(factor)])
        results.append(result if status == STATUS_OK else None)
    if any(status == STATUS_OVERFLOW and drift <= _NEAR_DRIFT for status, *_, drift in rows):
        return _info(rows)
    for i, riemannian in enumerate(results):
        if a.snapshots:
            a.snapshots[i].copy_(a.factors[i])
        if riemannian is not None:
            a.gradients[i].copy_(riemannian)
    return _info(rows)


_NEAR_DRIFT = 3.0  # a factor that is farther off overflows alone, as in the native kernels


def project_retract_(a: signatures.ProjectRetract) -> Tensor:
    rows: list[list[float]] = []
    for new, old, divisor in zip(a.moved, a.previous, a.divisors, strict=True):
        drift = _residual(old)
        if not (bool(new.isfinite().all()) and bool(old.isfinite().all())):
            rows.append([STATUS_NON_FINITE, math.nan, 0.0, 0.0, drift])
            continue
        wide = arithmetic_dtype(new.dtype)
        Y = old.to(wide)
        M = Y + stiefel.tangent_projection(Y, (new.to(wide) - Y) / divisor)
        if not bool(M.isfinite().all()):
            Y = old.double()  # with the range of float64
            M = Y + stiefel.tangent_projection(Y, new.double() / divisor - Y / divisor)
        status, residual = _retract(M, new)
        rows.append([status, residual, 0.0, PATH_SVD, drift])
    return _info(rows)


def _retract(M: Tensor, into: Tensor) -> tuple[int, float]:
    """Put uf(M) in place, and return status and residual; where M has overflowed nothing is written."""
    if not bool(M.isfinite().all()):
        return STATUS_OVERFLOW, math.nan
    into.copy_(stiefel.polar_factor(M))
    return STATUS_OK, _residual(into)


def stella_adamw_(a: signatures.StellaAdamWStep) -> Tensor:
    settings = a.hyperparameters.tolist()
    given = list(zip(a.factors, a.gradients, a.exp_avgs, a.exp_avg_sqs, a.couplings, settings, strict=True))
    finite = [bool(gradient.isfinite().all()) for gradient in a.gradients]
    if not all(finite):
        return _refused(finite)
    rows: list[list[float]] = []
    moves: list[tuple[Tensor, list[Tensor]] | None] = []  # of each factor that can: M and its new moments
    for factor, gradient, exp_avg, exp_avg_sq, K, row in given:
        rows.append([STATUS_NON_FINITE, math.nan, 0.0, 0.0, _residual(factor)])
        moves.append(None)
        if not all(bool(t.isfinite().all()) for t in (factor, exp_avg, exp_avg_sq, K)):
            continue
        wide = arithmetic_dtype(factor.dtype)
        lr, beta1, beta2, eps, step, divisor, sign = row
        Y = factor.to(wide)  # (n, r)
        D, m, v = adamw.adamw_move(
            *(Y, gradient.to(wide), exp_avg.to(wide), exp_avg_sq.to(wide)),
            **{"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "step": step, "divisor": divisor, "sign": sign},
            coupling=K.to(wide) if K.numel() else None,
        )
        moments = [new.to(exp_avg.dtype) for new in (m, v)]
        M = Y + stiefel.tangent_projection(Y, D)
        if not all(bool(t.isfinite().all()) for t in moments):
            rows[-1][0] = STATUS_OVERFLOW
        elif bool(M.isfinite().all()):
            rows[-1][0] = STATUS_OK
            moves[-1] = M, moments
    if any(row[0] == STATUS_OVERFLOW for row in rows):
        return _info(rows)
    for i, move in enumerate(moves):
        if move is not None:
            M, (exp_avg, exp_avg_sq) = move
            _, rows[i][1] = _retract(M, a.factors[i])
            rows[i][3] = PATH_SVD
            a.exp_avgs[i].copy_(exp_avg)
            a.exp_avg_sqs[i].copy_(exp_avg_sq)
    return _info(rows)


_WIDENED_ROWS = 1024  # of activations in half precision that are float32 at one time


def _summed_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, (a, b) from (T, a) and (T, b), in float32 at least: half precision would round every sum."""
    if arithmetic_dtype(left.dtype) == left.dtype:
        return left.mT @ right
    if left.device.type == "cuda":
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    total = left.new_zeros((left.shape[1], right.shape[1]), dtype=torch.float32)  # (a, b)
    for some, others in zip(left.split(_WIDENED_ROWS), right.split(_WIDENED_ROWS), strict=True):
        total.addmm_(some.float().mT, others.float())
    return total


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if p == 0.0:
        return x
    assert seed is not None  # arguments.py
    return torch.ops.stella_kernels.philox_dropout(x, p, seed)


def philox_dropout(a: signatures.PhiloxDropout) -> Tensor:
    return philox.dropout(a.x, a.p, a.seed)


def adapter_forward_(a: signatures.AdapterForward) -> Tensor:
    """No (T, m) temporary."""
    dtype = a.y.dtype
    U, S, Vt = a.U.to(dtype), a.S.to(dtype), a.Vt.to(dtype)
    with without_autocast(a.y.device):
        A = _dropped(a.x.to(dtype), a.p, a.seed) @ Vt.mT  # (T, r)
        P = adapter.times_core(A, S.mT if S.dim() == 2 else S)  # (T, r)
        a.y.addmm_(P, U.mT, alpha=a.scale)
    return A


def adapter_product(a: signatures.AdapterProduct) -> tuple[Tensor, Tensor]:
    T, m = a.x.shape[0], a.U.shape[0]
    y = a.x.new_zeros((T, m)) if a.b is None else a.b.to(a.x.dtype).repeat(T, 1)  # (T, m)
    return y, torch.ops.stella_kernels.adapter_forward_(y, a.x, a.U, a.S, a.Vt, a.scale, a.p, a.seed)


def adapter_backward_(a: signatures.AdapterBackward) -> tuple[Tensor, Tensor, Tensor]:
    dtype = a.grad_y.dtype
    need_U, need_S, need_Vt = a.needed
    grad_U, grad_S, grad_Vt = a.U.new_empty(0), a.S.new_empty(0), a.Vt.new_empty(0)
    core = a.S.to(dtype)
    with without_autocast(a.grad_y.device):
        if need_U:
            P = adapter.times_core(a.A, core.mT if core.dim() == 2 else core)  # (T, r)
            grad_U = _summed_over_rows(a.grad_y, P).mul_(a.scale).to(a.U.dtype)
        if not (need_S or need_Vt or a.grad_x is not None):
            return grad_U, grad_S, grad_Vt
        Q = (a.grad_y @ a.U.to(dtype)).mul_(a.scale)  # (T, r)
        if need_S:
            wide = arithmetic_dtype(dtype)
            grad_S = (Q.to(wide) * a.A.to(wide)).sum(0) if core.dim() == 1 else _summed_over_rows(Q, a.A)
            grad_S = grad_S.to(a.S.dtype)
        K = adapter.times_core(Q, core)  # (T, r)
        if need_Vt:
            grad_Vt = _summed_over_rows(K, _dropped(a.x.to(dtype), a.p, a.seed)).to(a.Vt.dtype)
        if a.grad_x is not None and a.p == 0.0:
            a.grad_x.addmm_(K, a.Vt.to(dtype), beta=a.beta)
        elif a.grad_x is not None:
            through = _dropped(K @ a.Vt.to(dtype), a.p, a.seed)  # (T, n)
            a.grad_x.copy_(through) if a.beta == 0.0 else a.grad_x.mul_(a.beta).add_(through)
    return grad_U, grad_S, grad_Vt


_IMPLEMENTATIONS: dict[type[signatures.Signature], Callable[[Any], Any]] = {
    signatures.Polar: polar,
    signatures.RiemannianGradient: riemannian_gradient_,
    signatures.ProjectRetract: project_retract_,
    signatures.StellaAdamWStep: stella_adamw_,
    **phases.IMPLEMENTATIONS,
    signatures.PhiloxDropout: philox_dropout,
    signatures.AdapterForward: adapter_forward_,
    signatures.AdapterProduct: adapter_product,
    signatures.AdapterBackward: adapter_backward_,
}


def _checked(implementation: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def serve(a: signatures.Signature) -> Any:
        arguments.check(a)
        return implementation(a)

    return serve


# To be called as torch calls it, where a native kernel serves torch.ops.stella_kernels.
REFERENCE: dict[str, Callable[..., Any]] = {
    signature.name: signatures.positional(signature, _checked(implementation))
    for signature, implementation in _IMPLEMENTATIONS.items()
}

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
from . import arguments, signatures
from .status import INFO_COLUMNS, PATH_SVD, STATUS_NON_FINITE, STATUS_OK


def _info(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, INFO_COLUMNS)


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def polar(a: signatures.Polar) -> tuple[Tensor, Tensor]:
    *leading, n, r = a.M.shape
    wide = a.M.to(_arithmetic_dtype(a.M.dtype))
    batch = wide.reshape(math.prod(leading), n, r)  # (B, n, r)
    finite = batch.isfinite().flatten(1).all(1) if batch.numel() else torch.ones(batch.shape[0], dtype=torch.bool)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise RuntimeError(
            f"polar: matrix {index} of M holds NaN or an infinity; the orthogonal polar factor is not defined for it. "
            "Check the values that were passed in."
        )
    Q = stiefel.polar_factor(batch)  # (B, n, r)
    residual = stiefel.orthonormality_error(Q)
    info = _info([[STATUS_OK, float(e), 0.0, PATH_SVD] for e in residual])
    return Q.reshape(a.M.shape).to(a.M.dtype), info


def riemannian_gradient_(a: signatures.RiemannianGradient) -> Tensor:
    finite = [bool(gradient.isfinite().all()) for gradient in a.gradients]
    status = [STATUS_OK if ok else STATUS_NON_FINITE for ok in finite]
    for i, (gradient, factor) in enumerate(zip(a.gradients, a.factors, strict=True) if all(finite) else ()):
        if a.snapshots:
            a.snapshots[i].copy_(factor)
        if not bool(factor.isfinite().all()):
            status[i] = STATUS_NON_FINITE
            continue
        wide = _arithmetic_dtype(gradient.dtype)
        gradient.copy_(stiefel.riemannian_gradient(factor.to(wide), gradient.to(wide)))
    return _info([[s, 0.0, 0.0, 0.0] for s in status])


def project_retract_(a: signatures.ProjectRetract) -> Tensor:
    rows: list[list[float]] = []
    for new, old, divisor in zip(a.moved, a.previous, a.divisors, strict=True):
        if not (bool(new.isfinite().all()) and bool(old.isfinite().all())):
            rows.append([STATUS_NON_FINITE, float("nan"), 0.0, 0.0])
            continue
        wide = _arithmetic_dtype(new.dtype)
        Q = stiefel.project_retract(old.to(wide), new.to(wide), divisor, "polar")
        rows.append([STATUS_OK, float(stiefel.orthonormality_error(Q)), 0.0, PATH_SVD])
        new.copy_(Q)
    return _info(rows)


def stella_adamw_(a: signatures.StellaAdamWStep) -> Tensor:
    settings = a.hyperparameters.tolist()
    given = list(zip(a.factors, a.gradients, a.exp_avgs, a.exp_avg_sqs, a.couplings, settings, strict=True))
    finite = [bool(gradient.isfinite().all()) for gradient in a.gradients]
    if not all(finite) and not a.skip_nonfinite:
        return _info([[STATUS_OK if ok else STATUS_NON_FINITE, 0.0, 0.0, 0.0] for ok in finite])
    rows: list[list[float]] = []
    for ok, (factor, gradient, exp_avg, exp_avg_sq, K, row) in zip(finite, given, strict=True):
        if not ok:
            rows.append([STATUS_NON_FINITE, float("nan"), 0.0, 0.0])
            continue
        wide = _arithmetic_dtype(factor.dtype)
        lr, beta1, beta2, eps, step, divisor, sign = row
        Y = factor.to(wide)  # (n, r)
        D, m, v = adamw.adamw_move(
            *(Y, gradient.to(wide), exp_avg.to(wide), exp_avg_sq.to(wide)),
            **{"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "step": step, "divisor": divisor, "sign": sign},
            coupling=K.to(wide) if K.numel() else None,
        )
        moved = Y + stiefel.tangent_projection(Y, D)
        if not bool(moved.isfinite().all()):
            rows.append([STATUS_NON_FINITE, float("nan"), 0.0, 0.0])
            continue
        Q = stiefel.polar_factor(moved)
        rows.append([STATUS_OK, float(stiefel.orthonormality_error(Q)), 0.0, PATH_SVD])
        for old, new in ((factor, Q), (exp_avg, m), (exp_avg_sq, v)):
            old.copy_(new)
    return _info(rows)


_WIDENED_ROWS = 1024  # of activations in half precision that are float32 at one time


def _summed_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, (a, b) from (T, a) and (T, b), in float32 at least: half precision would round every sum."""
    if _arithmetic_dtype(left.dtype) == left.dtype:
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
            wide = _arithmetic_dtype(dtype)
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

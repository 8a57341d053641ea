"""Schemas of the operators, their shapes under tracing, and the reference that serves where no native kernel does.

The reference is registered as ``CompositeExplicitAutograd``; a native library that is loaded takes over for its
own dispatch key (``backends.py`` decides which are loaded). Importing this module compiles nothing.

Operators over many factors take tensor lists, each tensor seen as (n, r): a factor stored transposed, (r, n),
comes as its ``.mT`` view and is never copied to transpose it.

``info`` is a (k, 4) float64 tensor, a row for each matrix or factor: status, residual, iterations, path. It is on the
CPU, but of an operator over lists that Triton serves on the factors' device, so that nothing has to wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import backends as backends  # loads the native library, which registers itself
from . import triton_backend
from .reference import adamw, adapter, philox, stiefel

STATUS_OK = 0
STATUS_NON_FINITE = 1
STATUS_NOT_CONVERGED = 2

PATH_NEWTON_SCHULZ = 0
PATH_FLOAT64_GRAM = 1
PATH_SVD = 2

INFO_COLUMNS = 4

_library = torch.library.Library("stella_kernels", "DEF")

_library.define("polar(Tensor M, str method) -> (Tensor, Tensor)")
_library.define("riemannian_gradient_(Tensor(a!)[] gradients, Tensor[] factors, Tensor(b!)[] snapshots) -> Tensor")
_library.define("project_retract_(Tensor(a!)[] moved, Tensor[] previous, float[] divisors, str method) -> Tensor")


def _info(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, INFO_COLUMNS)


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _info_fake(operator: str, factors: list[Tensor]) -> Tensor:
    device = factors[0].device if factors else torch.device("cpu")
    served = backends.serving(operator, device.type) == "triton"
    return torch.empty((len(factors), INFO_COLUMNS), dtype=torch.float64, device=device if served else "cpu")


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
def _riemannian_gradient_reference(gradients: list[Tensor], factors: list[Tensor], snapshots: list[Tensor]) -> Tensor:
    """∇ ← ∇ − Y ∇ᵀ Y in place; each factor is copied to its snapshot, where there are any.

    Nothing at all is written when a gradient is non-finite. The gradient of a factor that is not finite itself is left
    as it was.
    """
    finite = [bool(gradient.isfinite().all()) for gradient in gradients]
    status = [STATUS_OK if ok else STATUS_NON_FINITE for ok in finite]
    for i, (gradient, factor) in enumerate(zip(gradients, factors, strict=True) if all(finite) else ()):
        if snapshots:
            snapshots[i].copy_(factor)
        if not bool(factor.isfinite().all()):
            status[i] = STATUS_NON_FINITE
            continue
        wide = _arithmetic_dtype(gradient.dtype)
        gradient.copy_(stiefel.riemannian_gradient(factor.to(wide), gradient.to(wide)))
    return _info([[s, 0.0, 0.0, 0.0] for s in status])


@torch.library.register_fake("stella_kernels::riemannian_gradient_", lib=_library)
def _riemannian_gradient_fake(gradients: list[Tensor], factors: list[Tensor], snapshots: list[Tensor]) -> Tensor:
    return _info_fake("riemannian_gradient_", gradients)


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
    return _info_fake("project_retract_", moved)


# The whole AdamW step of constrained factors. Every list holds (n, r) views. A row of hyperparameters, (k, 7) float64
# on the CPU: lr, β₁, β₂, eps, step t (this one counted), divisor of the gradient scaling, sign (−1 to maximize).
# couplings[i] is K = ∇ᵀY (r, r), float64 or float32, or has no elements where it is to be computed. Status 1 where a
# gradient is not finite: nothing at all is written, or with skip_nonfinite all factors but those. Status 1 beside a
# finite gradient: the factor or its step is not finite; it is not moved (its moments may have been), the others are.
_library.define(
    "stella_adamw_(Tensor(a!)[] factors, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] couplings, Tensor hyperparameters, bool skip_nonfinite) -> Tensor"
)


@torch.library.impl(_library, "stella_adamw_", "CompositeExplicitAutograd")
def _stella_adamw_reference(
    factors: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    couplings: list[Tensor],
    hyperparameters: Tensor,
    skip_nonfinite: bool,
) -> Tensor:
    settings = hyperparameters.tolist()
    given = list(zip(factors, gradients, exp_avgs, exp_avg_sqs, couplings, settings, strict=True))
    finite = [bool(gradient.isfinite().all()) for gradient in gradients]
    if not all(finite) and not skip_nonfinite:
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


@torch.library.register_fake("stella_kernels::stella_adamw_", lib=_library)
def _stella_adamw_fake(
    factors: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    couplings: list[Tensor],
    hyperparameters: Tensor,
    skip_nonfinite: bool,
) -> Tensor:
    return _info_fake("stella_adamw_", factors)


# The adapter. Everything is computed in y's dtype (the base layer's, so autocast's inside autocast): x and the factors
# are cast to it where they differ, and the factors' gradients return in the factors' own dtype. y, x and grad_x are
# (T, m), (T, n) and (T, n). The seed is an int64 scalar on x's device, None when p is 0.
_library.define("philox_dropout(Tensor x, float p, Tensor seed) -> Tensor")
_library.define(
    "adapter_forward_(Tensor(a!) y, Tensor x, Tensor U, Tensor S, Tensor Vt, float scale, float p, Tensor? seed) "
    "-> Tensor"
)
# The same where nothing is there to add to: y = b + s d(x) V Sᵀ Uᵀ in x's dtype, and A. A base product that
# accumulates into y may follow, which spares reading and writing y once more.
_library.define(
    "adapter_product(Tensor x, Tensor? b, Tensor U, Tensor S, Tensor Vt, float scale, float p, Tensor? seed) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "adapter_backward_(Tensor(a!)? grad_x, float beta, Tensor grad_y, Tensor x, Tensor A, Tensor U, Tensor S, "
    "Tensor Vt, float scale, float p, Tensor? seed, bool[] needed) -> (Tensor, Tensor, Tensor)"
)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off inside an operator: its dtypes are settled already, and in-place products refuse a mixture."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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
    if seed is None:
        raise ValueError(f"seed: found None with dropout {p}, wanted an int64 scalar tensor.")
    return torch.ops.stella_kernels.philox_dropout(x, p, seed)


@torch.library.impl(_library, "philox_dropout", "CompositeExplicitAutograd")
def _philox_dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return philox.dropout(x, p, seed)


@torch.library.register_fake("stella_kernels::philox_dropout", lib=_library)
def _philox_dropout_fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.impl(_library, "adapter_forward_", "CompositeExplicitAutograd")
def _adapter_forward_reference(
    y: Tensor, x: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
) -> Tensor:
    """y += s P Uᵀ in place, no (T, m) temporary; returns A = d(x) V, (T, r)."""
    U, S, Vt = U.to(y.dtype), S.to(y.dtype), Vt.to(y.dtype)
    with _without_autocast(y.device):
        A = _dropped(x.to(y.dtype), p, seed) @ Vt.mT  # (T, r)
        P = adapter.times_core(A, S.mT if S.dim() == 2 else S)  # (T, r)
        y.addmm_(P, U.mT, alpha=scale)
    return A


@torch.library.register_fake("stella_kernels::adapter_forward_", lib=_library)
def _adapter_forward_fake(
    y: Tensor, x: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
) -> Tensor:
    return y.new_empty((x.shape[0], Vt.shape[0]))


@torch.library.impl(_library, "adapter_product", "CompositeExplicitAutograd")
def _adapter_product_reference(
    x: Tensor, b: Tensor | None, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = x.new_zeros((x.shape[0], U.shape[0])) if b is None else b.to(x.dtype).repeat(x.shape[0], 1)  # (T, m)
    return y, torch.ops.stella_kernels.adapter_forward_(y, x, U, S, Vt, scale, p, seed)


@torch.library.register_fake("stella_kernels::adapter_product", lib=_library)
def _adapter_product_fake(
    x: Tensor, b: Tensor | None, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], U.shape[0])), x.new_empty((x.shape[0], Vt.shape[0]))


@torch.library.impl(_library, "adapter_backward_", "CompositeExplicitAutograd")
def _adapter_backward_reference(
    grad_x: Tensor | None,
    beta: float,
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x = beta grad_x + dᵀ(K Vᵀ) in place; returns ∂U, ∂S, ∂Vᵀ, each of shape (0,) where ``needed`` says no."""
    dtype = grad_y.dtype
    need_U, need_S, need_Vt = needed
    grad_U, grad_S, grad_Vt = U.new_empty(0), S.new_empty(0), Vt.new_empty(0)
    core = S.to(dtype)
    with _without_autocast(grad_y.device):
        if need_U:
            P = adapter.times_core(A, core.mT if S.dim() == 2 else core)  # (T, r)
            grad_U = _summed_over_rows(grad_y, P).mul_(scale).to(U.dtype)
        if not (need_S or need_Vt or grad_x is not None):
            return grad_U, grad_S, grad_Vt
        Q = (grad_y @ U.to(dtype)).mul_(scale)  # (T, r)
        if need_S:
            wide = _arithmetic_dtype(dtype)
            grad_S = (Q.to(wide) * A.to(wide)).sum(0) if S.dim() == 1 else _summed_over_rows(Q, A)
            grad_S = grad_S.to(S.dtype)
        K = adapter.times_core(Q, core)  # (T, r)
        if need_Vt:
            grad_Vt = _summed_over_rows(K, _dropped(x.to(dtype), p, seed)).to(Vt.dtype)
        if grad_x is not None and p == 0.0:
            grad_x.addmm_(K, Vt.to(dtype), beta=beta)
        elif grad_x is not None:
            through = _dropped(K @ Vt.to(dtype), p, seed)  # (T, n)
            grad_x.copy_(through) if beta == 0.0 else grad_x.mul_(beta).add_(through)
    return grad_U, grad_S, grad_Vt


@torch.library.register_fake("stella_kernels::adapter_backward_", lib=_library)
def _adapter_backward_fake(
    grad_x: Tensor | None,
    beta: float,
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip((U, S, Vt), needed, strict=True)
    ]
    return grads[0], grads[1], grads[2]


triton_backend.register(_library)

# The reference of every operator, to be called as it is where a native kernel serves torch.ops.stella_kernels.
REFERENCE: dict[str, Callable[..., object]] = {
    "polar": _polar_reference,
    "riemannian_gradient_": _riemannian_gradient_reference,
    "project_retract_": _project_retract_reference,
    "stella_adamw_": _stella_adamw_reference,
    "adapter_forward_": _adapter_forward_reference,
    "adapter_product": _adapter_product_reference,
    "adapter_backward_": _adapter_backward_reference,
    "philox_dropout": _philox_dropout_reference,
}

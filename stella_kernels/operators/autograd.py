"""How gradients flow through the adapter: its two autograd functions.

The equations are those of ``reference/adapter.py``. Saved for backward are x, A (T, r), the factors, the dropout seed
and the base weight, all but A alive already: never a mask, a dropped copy of x or anything of size (T, m).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import planned
from . import registration as _registration  # noqa: F401  (defines the operators)
from .base_product import accumulate_product, library_computes_in
from .differentiable_once import Gradients, differentiable_once

_kernels = torch.ops.stella_kernels


def _refuse_batched_gradients(grad_y: Tensor) -> None:
    if torch.compiler.is_compiling():
        return  # the compiler met the transform on the way forward
    if torch._C._functorch.is_batchedtensor(grad_y) or torch._C._functorch.is_legacy_batchedtensor(grad_y):
        raise NotImplementedError(
            "stella_kernels: the gradient of an adapter was asked for a batch of output gradients (vmap, "
            "is_grads_batched=True, vectorize=True), wanted one at a time; loop over them."
        )


def _adapter_gradients(
    ctx: Any,
    grad_x: Tensor | None,
    beta: float,
    grad_y: Tensor,
    saved: tuple[Tensor, ...],
    needed: list[bool],
    operator: Callable[..., Sequence[Tensor]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂U, ∂S, ∂Vᵀ where ``needed``, else None; grad_x = beta grad_x + the adapter's part, in place; by the operator."""
    x, A, U, S, Vt, seed = saved  # x (T, n)
    if not (any(needed) or grad_x is not None):
        return None, None, None
    grads = operator(grad_x, beta, grad_y, x, A, U, S, Vt, ctx.scale, ctx.p, seed, needed)
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))  # type: ignore[return-value]


def _recomputed(ctx: Any, grad_y: Tensor, x: Tensor, U: Tensor, S: Tensor, Vt: Tensor, seed: Tensor | None) -> Tensor:
    """A = d(x) V (T, r) once more, as the forward pass had it: the adapter of an output without columns."""
    y = grad_y.new_empty((x.shape[0], 0))
    return planned.adapter_forward_(y, x, U[:0], S, Vt, ctx.scale, ctx.p, seed)


_FEW_WEIGHTS = 1 << 21  # weights have as many at least before their product comes first


def _adapter_goes_first(x: Tensor, W: Tensor) -> bool:
    """Whether the base product is to be accumulated into the adapter's, instead of the other way round.

    On the CPU that spares one reading of y, and of grad_x: a gain beside a small weight's product. A large one's loses
    more by accumulating than that (measured at 4096 × 4096 and 2048 rows: 25 ms of 370 against 3), unless it is in a
    half precision that the library has no kernels for.
    """
    if x.device.type != "cpu" or x.dtype != W.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if W.numel() < _FEW_WEIGHTS:
        return True
    # what the library has cannot be asked while a graph is traced; the compiler makes the product itself
    return not torch.compiler.is_compiling() and not library_computes_in(x.dtype)


def _as_input(grad_x: Tensor, x: Tensor) -> Tensor:
    """Of x's dtype and shape, neither of which is usually to be changed."""
    grad_x = grad_x if grad_x.dtype == x.dtype else grad_x.to(x.dtype)
    return grad_x if grad_x.dim() == x.dim() else grad_x.view(x.shape)


class StellaLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b + s d(x) V Sᵀ Uᵀ as one node: x (..., n), y (T, m)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        U: Tensor,
        S: Tensor,
        Vt: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (T, n), a view wherever x's strides allow one; x itself is saved
        if _adapter_goes_first(x, W):
            y, A = _kernels.adapter_product(rows, b, U, S, Vt, scale, p, seed)  # (T, m), (T, r)
            accumulate_product(y, rows, W.mT)
        else:
            y = F.linear(rows, W, b)  # (T, m), in autocast's dtype inside autocast
            A = _kernels.adapter_forward_(y, rows, U, S, Vt, scale, p, seed)  # (T, r)
            planned.keep_linear(y)
        ctx.save_for_backward(x, W, None if recompute else A, U, S, Vt, seed)
        ctx.scale, ctx.p = scale, p
        ctx.bias_dtype = None if b is None else b.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_y: Tensor) -> Gradients:
        _refuse_batched_gradients(grad_y)
        x, W, A, U, S, Vt, seed = saved
        need_x, need_W, need_b, *need_factors = ctx.needs_input_grad[:6]
        alone = not (need_W or need_b or A is None)
        if alone and planned.may_launch(grad_y):
            grads = planned.linear_backward(grad_y, x, W, A, U, S, Vt, ctx.scale, ctx.p, seed, need_x, need_factors)
            if grads:
                grad_x = _as_input(grads[0], x) if need_x else None
                made = (g if need else None for g, need in zip(grads[-3:], need_factors, strict=True))
                return grad_x, None, None, *made, None, None, None, None
        grad_y = grad_y.reshape(-1, grad_y.shape[-1])  # (T, m)
        rows = x.reshape(-1, x.shape[-1])  # (T, n)
        first = need_x and _adapter_goes_first(grad_y, W)
        grad_x = (
            None if not need_x else grad_y.new_empty(rows.shape) if first else grad_y @ W.to(grad_y.dtype)
        )  # (T, n)
        grad_W = (grad_y.mT @ rows.to(grad_y.dtype)).to(W.dtype) if need_W else None
        grad_b = grad_y.sum(0, dtype=ctx.bias_dtype) if need_b else None
        if A is None:
            A = _recomputed(ctx, grad_y, rows, U, S, Vt, seed)
        terms = (rows, A, U, S, Vt, seed)
        beta, operator = 0.0 if first else 1.0, _kernels.adapter_backward_
        factors = _adapter_gradients(ctx, grad_x, beta, grad_y, terms, need_factors, operator)
        if grad_x is not None and first:
            accumulate_product(grad_x, grad_y, W)
        elif alone:
            planned.keep_linear_backward(grad_y, W)
        if grad_x is not None:
            grad_x = _as_input(grad_x, x)
        return grad_x, grad_W, grad_b, *factors, None, None, None, None


class LaunchedLinearFunction(StellaLinearFunction):
    """The same node for what ``planned.linear`` has computed: y (..., m), A and a seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        U: Tensor,
        S: Tensor,
        Vt: Tensor,
        scale: float,
        p: float,
        computed: Any,
        recompute: bool,
    ) -> Tensor:
        y, A = computed[:2]
        seed = computed[2] if p else None
        ctx.save_for_backward(x, W, None if recompute else A, U, S, Vt, seed)
        ctx.scale, ctx.p = scale, p
        ctx.bias_dtype = None if b is None else b.dtype
        return y


# Function.apply without its Python: that is for torch.func's transforms, under which no plan is launched.
launched_linear: Any = super(torch.autograd.Function, LaunchedLinearFunction).apply


class StellaAdapterFunction(torch.autograd.Function):
    """y += s d(x) V Sᵀ Uᵀ in place on the output of an opaque base: x (..., n), y (..., m)."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        U: Tensor,
        S: Tensor,
        Vt: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            # the compiler loses the order of the gradients where a function overwrites a view; it elides this copy
            y = y.clone()
        else:
            ctx.mark_dirty(y)
            if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                x = x.clone()  # backward needs it as it was, and no version counter would tell
        rows = x.reshape(-1, x.shape[-1])  # (T, n)
        flat = y.reshape(-1, y.shape[-1])  # (T, m), a view wherever y's strides allow one
        A = planned.adapter_forward_(flat, rows, U, S, Vt, scale, p, seed)  # (T, r)
        if not y.is_contiguous():
            y.copy_(flat.view(y.shape))
        ctx.save_for_backward(x, None if recompute else A, U, S, Vt, seed)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_y: Tensor) -> Gradients:
        _refuse_batched_gradients(grad_y)
        x, A, U, S, Vt, seed = saved
        need_y, need_x, *need_factors = ctx.needs_input_grad[:5]
        rows = x.reshape(-1, x.shape[-1])  # (T, n)
        flat = grad_y.reshape(-1, grad_y.shape[-1])  # (T, m)
        if A is None:
            A = _recomputed(ctx, flat, rows, U, S, Vt, seed)
        grad_x = flat.new_empty(rows.shape) if need_x else None  # (T, n)
        terms = (rows, A, U, S, Vt, seed)
        factors = _adapter_gradients(ctx, grad_x, 0.0, flat, terms, need_factors, planned.adapter_backward_)
        if grad_x is not None:
            grad_x = _as_input(grad_x, x)
        return grad_y if need_y else None, grad_x, *factors, None, None, None, None

"""The public functions: checked arguments, gradients, ``torch.compile(fullgraph=True)``; nothing but torch needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import METHODS, check_choice, check_float_tensor, check_tall
from .operators import planned
from .operators.autograd import StellaAdapterFunction, StellaLinearFunction, launched_linear
from .operators.memory import overlaps_itself
from .operators.polar_gradient import PolarFunction
from .operators.status import INFO_COLUMNS
from .reference.autocast import autocasts

__all__ = ["join_adapters", "polar", "stella_adapter", "stella_linear"]


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _check_same_device(device: torch.device, others: dict[str, Tensor]) -> None:
    for argument, value in others.items():
        if value.device != device:
            raise ValueError(
                f"{argument}: found on {value.device}, wanted {device}, where x is; "
                f"move it with {argument}.to(x.device)."
            )


def _check_adapter(x: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, dropout_p: float) -> None:
    for argument, value in (("x", x), ("U", U), ("S", S), ("Vt", Vt)):
        check_float_tensor(argument, value)
    for argument, value in (("U", U), ("Vt", Vt)):
        if value.dim() != 2 or value.numel() == 0:
            raise ValueError(f"{argument}: found shape {_shape(value)}, wanted a matrix with no empty side.")
    (m, r), (r_in, n) = U.shape, Vt.shape
    if r_in != r:
        raise ValueError(
            f"Vt: found shape {_shape(Vt)}, wanted (r, n) with U's rank r = {r}; Vt is stored transposed: "
            "if this is V, pass V.mT."
        )
    if r > n or r > m:
        raise ValueError(
            f"{'Vt' if r > n else 'U'}: found rank r = {r} above the layer's {'in' if r > n else 'out'} features, "
            f"{n if r > n else m}; orthonormal columns need r <= {min(m, n)}: choose a smaller r."
        )
    if S.shape not in ((r, r), (r,)):
        raise ValueError(
            f"S: found shape {_shape(S)}, wanted ({r}, {r}), or ({r},) for a diagonal S, to go with U and Vt."
        )
    if x.dim() < 1 or x.shape[-1] != n:
        raise ValueError(f"x: found shape {_shape(x)}, wanted (..., {n}): its last dimension is that of Vt.")
    _check_same_device(x.device, {"U": U, "S": S, "Vt": Vt})
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale: found {type(scale).__name__}, wanted a number, alpha / r or alpha / sqrt(r).")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: found {type(dropout_p).__name__}, wanted a number in [0, 1].")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: found {dropout_p}, wanted a probability in [0, 1].")


def _check_base(x: Tensor, W: Tensor, b: Tensor | None, m: int, n: int) -> None:
    check_float_tensor("W", W)
    if W.dim() != 2 or W.shape[0] != m or W.shape[1] != n:
        raise ValueError(f"W: found shape {_shape(W)}, wanted ({m}, {n}): U's rows by Vt's columns.")
    _check_same_device(x.device, {"W": W})
    tensors = {"W": W}
    if b is not None:
        check_float_tensor("b", b)
        if b.dim() != 1 or b.shape[0] != m:
            raise ValueError(f"b: found shape {_shape(b)}, wanted ({m},), one for each row of W.")
        _check_same_device(x.device, {"b": b})
        tensors["b"] = b
    if autocasts(x.device):
        return
    for argument, value in tensors.items():
        if value.dtype != x.dtype:
            raise TypeError(
                f"{argument}: found dtype {value.dtype} with x in {x.dtype}, wanted the same outside autocast "
                "(the factors may differ, the base may not); convert x, or enter torch.autocast."
            )


_BATCH_WITHOUT_VMAP = (
    "x takes any leading dimensions, so batch without vmap, and use torch.autograd.grad, or the plain formula in "
    "stella_kernels.reference.adapter"
)


def _refuse_transforms(function: str, instead: str = _BATCH_WITHOUT_VMAP) -> None:
    """torch.func's transforms go through an autograd function only where it has rules of its own for them.

    The compiler lets them through all the same, to gradients that are wrong.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{function}: called under a transform of torch.func (vmap, grad, jacrev, jvp), wanted eager or compiled "
            f"execution; {instead}."
        )


def _refuse_compiled_forward_mode(function: str) -> None:
    """A compiled graph of operators would drop their tangents, silently; the compiler guards on the level it read."""
    if torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{function}: compiled inside torch.autograd.forward_ad.dual_level, wanted reverse mode: forward-mode "
            "differentiation is not implemented under torch.compile; call it outside torch.compile."
        )


def _dropout(x: Tensor, dropout_p: float, training: bool) -> tuple[float, Tensor | None]:
    """The dropout probability in force and its seed, drawn from torch's default generator of x's device."""
    if not training or dropout_p == 0.0:
        return 0.0, None
    return float(dropout_p), torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)


def _launched(
    x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, recompute: bool
) -> Tensor | None:
    """The layer by a plan, where one is known for arguments like these, which were checked when it was made."""
    if torch._C._are_functorch_transforms_active():
        return None
    grad = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        computed = planned.linear(x, W, b, U, S, Vt, scale, p)
    except (RuntimeError, TypeError):
        return None  # of arguments that are no such tensors; the long way says what is wrong with them
    finally:
        torch._C._set_grad_enabled(grad)
    if not computed or not grad:
        return computed[0] if computed else None
    return launched_linear(x, W, b, U, S, Vt, scale, p, computed, recompute)


def stella_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: bool = False,
) -> Tensor:
    """A linear layer with its StelLA adapter: ``x Wᵀ + b + scale · dropout(x) V Sᵀ Uᵀ`` (arXiv 2510.01938).

    One autograd node that saves for backward x, A = dropout(x) V of shape (T, r), and the dropout seed; T is the number
    of rows of x. A gradient is computed for whichever of the arguments requires one, W and b included.

    Args:
        x: (..., n), strides as they may be, T = 0 allowed.
        W: (m, n), the base weight; outside autocast of x's dtype.
        b: (m,) of W's dtype, or None.
        U: (m, r), any float dtype (float32 masters beside a bfloat16 model are meant): the product is computed in the
            result's dtype, the gradients of the factors arrive in theirs.
        S: (r, r), or (r,) when S is diagonal; any float dtype.
        Vt: (r, n) = Vᵀ, any float dtype.
        scale: s, alpha / r, or alpha / sqrt(r) with rsLoRA.
        dropout_p: probability that an element of x is dropped before the adapter (the base sees x itself); in force
            when ``training``. The mask is Philox's under a seed drawn from torch's default generator, so
            ``torch.manual_seed`` and activation checkpointing reproduce it; p counts in steps of 2⁻¹⁶.
        training: whether dropout is in force.
        recompute: compute A anew in the backward pass instead of keeping its T r elements.

    Returns:
        (..., m), in x's dtype, or inside ``torch.autocast`` in autocast's.

    All tensors on one device, any device; float32, float64, bfloat16, float16. Differentiable once: a second derivative
    raises RuntimeError.

    Raises:
        NotImplementedError: called under a transform of torch.func (vmap, grad, jvp), or in forward mode, compiled too.
        TypeError: an argument is not a floating-point tensor, or W or b differs from x in dtype outside autocast.
        ValueError: shapes that do not go together, r above m or n, devices that differ, dropout_p outside [0, 1].
    """
    if isinstance(x, Tensor) and planned.may_launch(x) and type(scale) is float and type(dropout_p) is float:
        launched = _launched(x, W, b, U, S, Vt, scale, dropout_p if training else 0.0, recompute)
        if launched is not None:
            return launched
    _refuse_transforms("stella_linear")
    _refuse_compiled_forward_mode("stella_linear")
    _check_adapter(x, U, S, Vt, scale, dropout_p)
    _check_base(x, W, b, U.shape[0], Vt.shape[1])
    p, seed = _dropout(x, dropout_p, training)
    y = StellaLinearFunction.apply(x, W, b, U, S, Vt, float(scale), p, seed, recompute)  # (T, m)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], W.shape[0])


def stella_adapter(
    y: Tensor,
    x: Tensor,
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: bool = False,
) -> Tensor:
    """Accumulate the adapter into the output of any base layer, in place: ``y += scale · dropout(x) V Sᵀ Uᵀ``.

    For a base that is not a plain matrix (quantized, sharded, Conv1D): ``y = stella_adapter(base(x), x, ...)``. No
    temporary of y's size is made, and x's gradient from the base is autograd's own affair.

    Args:
        y: (..., m), the base's output, which is used up: its memory holds the result (a compiled graph may use other
            memory), so go on with what is returned. Everything is computed in its dtype.
        x: (..., n), with y's leading dimensions; any float dtype. Copied where it shares y's memory.
        U: as in `stella_linear`, as all that follow.
        S: (r, r), or (r,) when S is diagonal.
        Vt: (r, n).
        scale: s.
        dropout_p: probability that an element of x is dropped.
        training: whether dropout is in force.
        recompute: compute A anew in the backward pass.

    Returns:
        (..., m) in y's dtype: y itself, outside ``torch.compile``.

    Raises:
        NotImplementedError: as `stella_linear`.
        TypeError: as `stella_linear`.
        ValueError: as `stella_linear`; where y's shape is not x's leading dimensions and m; where y is a leaf that
            requires grad, or expanded, and may not be overwritten.
    """
    _refuse_transforms("stella_adapter")
    _refuse_compiled_forward_mode("stella_adapter")
    _check_adapter(x, U, S, Vt, scale, dropout_p)
    check_float_tensor("y", y)
    wanted = (*x.shape[:-1], U.shape[0])
    if y.shape != wanted:
        raise ValueError(f"y: found shape {_shape(y)}, wanted {wanted}: x's leading dimensions and U's rows.")
    _check_same_device(x.device, {"y": y})
    if y.requires_grad and y.is_leaf and torch.is_grad_enabled():
        raise ValueError("y: found a leaf that requires grad, wanted the output of a layer; pass y.clone().")
    if not torch.compiler.is_compiling() and overlaps_itself(y):
        raise ValueError(
            f"y: found strides {y.stride()} for shape {_shape(y)}, several elements in one place, wanted memory of its "
            "own for each; pass y.clone()."
        )
    p, seed = _dropout(x, dropout_p, training)
    return StellaAdapterFunction.apply(y, x, U, S, Vt, float(scale), p, seed, recompute)


def join_adapters(adapters: Sequence[tuple[Tensor, Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Several adapters of one layer as one: U, S, Vt and scale whose adapter is the sum of the given ones'.

    U and Vᵀ are stacked along the rank, S is block-diagonal with the scales in it (diagonal where every S is), so that
    one pass over the activations serves all; in the widest dtype of theirs, float32 at least. Gradients reach the given
    factors; a dropout mask is then shared.

    Args:
        adapters: (U (m, rᵢ), S (rᵢ, rᵢ) or (rᵢ,), Vt (rᵢ, n), scale) of each, at least one; any device and float dtype.

    Raises:
        ValueError: no adapters.
    """
    if not adapters:
        raise ValueError("adapters: found none, wanted at least one.")
    if len(adapters) == 1:
        return adapters[0]
    dtype = torch.float32  # at least: a scaled S is not rounded to half precision
    for U, S, Vt, _ in adapters:
        for factor in (U, S, Vt):
            dtype = torch.promote_types(dtype, factor.dtype)
    cores = [S.to(dtype) if scale == 1.0 else S.to(dtype) * scale for _, S, _, scale in adapters]
    if all(S.dim() == 1 for S in cores):
        core = torch.cat(cores)
    else:
        core = torch.block_diag(*(S.diag() if S.dim() == 1 else S for S in cores))
    U, Vt = (
        torch.cat([U.to(dtype) for U, _, _, _ in adapters], 1),
        torch.cat([Vt.to(dtype) for _, _, Vt, _ in adapters]),
    )
    return U, core, Vt, 1.0


@overload
def polar(M: Tensor, method: str = "auto", return_info: Literal[False] = False) -> Tensor: ...


@overload
def polar(M: Tensor, method: str = "auto", *, return_info: Literal[True]) -> tuple[Tensor, Tensor]: ...


def polar(M: Tensor, method: str = "auto", return_info: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The orthogonal polar factor ``uf(M) = M (MᵀM)^(-1/2)`` of each matrix: the nearest with orthonormal columns.

    Differentiable once, in reverse and in forward mode and under torch.func's transforms (jvp is refused by
    ``torch.compile``): with K = QᵀḠ, the gradient is ``(Ḡ − QK) H⁻¹ + Q L⁻¹(K − Kᵀ)``, where M = QH and L(Ω) = HΩ + ΩH
    (Higham, "Functions of Matrices", 2008, chapter 8). A matrix whose condition number reaches 1/eps of the arithmetic
    (8e6 in float32) has a factor (one of many where the rank is deficient, orthonormal all the same) but no gradient:
    its gradient is NaN throughout, and nothing is raised.

    Args:
        M: (..., n, r) with n >= r, float32, float64, bfloat16 or float16 (the last two are computed in float32), on any
            device; an empty batch gives an empty result.
        method: "auto" (decides from condition number and residual, for each matrix), "newton_schulz" or "svd".
        return_info: also return what was done.

    Returns:
        Q of M's shape and dtype; with ``return_info`` also info, (matrices, 5) float64 on the CPU, with the columns
        status (0 ok, 2 not converged), residual (measured, or bounded: ‖QᵀQ − I‖_F of Q as stored is not above it),
        iterations (0: MᵀM is near a multiple of I, and its series is enough), path, and a 0 (``operators/status.py``).

    Raises:
        TypeError: M is not a floating-point tensor.
        ValueError: M is not (..., n, r) with n >= r, or method is none of the three.
        RuntimeError: a matrix holds NaN or an infinity (the message names it), or a second derivative is asked for.
        NotImplementedError: compiled by torch.compile under a transform of torch.func or in forward mode.
    """
    check_float_tensor("M", M)
    check_tall("M", M)
    check_choice("method", method, METHODS)
    compiling = torch.compiler.is_compiling()
    if compiling:
        _refuse_transforms("polar", "call it outside torch.compile, where transforms work, or use torch.autograd.grad")
        _refuse_compiled_forward_mode("polar")
    if M.numel() == 0:
        matrices = 1
        for size in M.shape[:-2]:
            matrices *= size
        Q, info = M.clone(), torch.zeros((matrices, INFO_COLUMNS), dtype=torch.float64, device="cpu")
    elif compiling:
        Q, info = torch.ops.stella_kernels.polar(M, method)
    else:
        Q, info = PolarFunction.apply(M, method)
    return (Q, info) if return_info else Q

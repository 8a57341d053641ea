"""The operators of ``torch.ops.stella_kernels`` on Triton: arguments checked, what kernels do not take passed on.

``info`` is on the factors' device, so that nothing waits for it; of polar, which raises for data that is not finite, on
the CPU. The reference takes ranks above 128 and ``method='svd'``, which is torch's own on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import adapter_operators, stiefel
from .configuration import ELEMENTS, MAX_RANK

METHODS = ("auto", "newton_schulz", "svd")


def _check_lists(operator: str, **lists: Sequence[Tensor]) -> None:
    """Raise RuntimeError, as the CPU kernels do, where the lists do not belong together."""
    (name, first), *rest = lists.items()
    for other, tensors in rest:
        if len(tensors) != len(first):
            raise RuntimeError(
                f"{operator}: found {len(first)} and {len(tensors)} tensors in {name} and {other}, wanted as many "
                "of each."
            )
    for i, tensor in enumerate(first):
        _check_factor(operator, f"{name}[{i}]", tensor)
        for other, tensors in rest:
            value = tensors[i]
            if (value.shape, value.dtype, value.device) != (tensor.shape, tensor.dtype, tensor.device):
                raise RuntimeError(
                    f"{operator}: {other}[{i}]: found {tuple(value.shape)}, {value.dtype} on {value.device}, wanted "
                    f"the same shape, the same dtype and the same device as {name}[{i}]: {tuple(tensor.shape)}, "
                    f"{tensor.dtype} on {tensor.device}."
                )


def _check_factor(operator: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.shape[0] < tensor.shape[1]:
        raise RuntimeError(
            f"{operator}: {name}: found {tuple(tensor.shape)}, wanted (n, r) with n >= r; pass a factor that is stored "
            "transposed as its .mT view."
        )
    if tensor.dtype not in ELEMENTS:
        raise RuntimeError(
            f"{operator}: {name}: found {tensor.dtype}, wanted float32, float64, bfloat16 or float16; convert it."
        )


def _check_method(operator: str, method: str) -> None:
    if method not in METHODS:
        raise RuntimeError(f"{operator}: method: found {method!r}, wanted one of {', '.join(map(repr, METHODS))}.")


def _groups(factors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the factors of each dtype and device, empty factors left out; one group wherever they are alike."""
    kinds: dict[object, list[int]] = {}
    for i, factor in enumerate(factors):
        if factor.numel():
            kinds.setdefault((factor.dtype, factor.device), []).append(i)
    return list(kinds.values())


def _takes(factors: Sequence[Tensor]) -> bool:
    return all(factor.shape[1] <= MAX_RANK for factor in factors)


def _of_groups(factors: Sequence[Tensor], call: Callable[[list[int]], Tensor]) -> Tensor:
    """Rows of ``info`` of all factors from those of each group; those of one group alone are not copied."""
    groups = _groups(factors)
    if len(groups) == 1 and len(groups[0]) == len(factors):
        return call(groups[0])
    device = factors[0].device if factors else None
    info = torch.zeros(len(factors), ops.INFO_COLUMNS, dtype=torch.float64, device=device)
    for group in groups:
        info[torch.tensor(group, device=device)] = call(group).to(info.device)
    return info


def riemannian_gradient_(gradients: list[Tensor], factors: list[Tensor], snapshots: list[Tensor]) -> Tensor:
    """∇ ← ∇ − Y ∇ᵀ Y in place; see ``ops.py``."""
    lists = {"gradients": gradients, "factors": factors}
    if snapshots:
        lists["snapshots"] = snapshots
    _check_lists("riemannian_gradient_", **lists)
    # A gradient that is not finite stops them all, so that two kinds of factors cannot be two calls of the kernels.
    if not _takes(factors) or len(_groups(factors)) > 1:
        return _reference("riemannian_gradient_", factors, gradients, factors, snapshots)
    return _of_groups(
        factors,
        lambda at: stiefel.riemannian_gradient_(
            [gradients[i] for i in at], [factors[i] for i in at], [snapshots[i] for i in at] if snapshots else []
        ),
    )


def project_retract_(moved: list[Tensor], previous: list[Tensor], divisors: list[float], method: str) -> Tensor:
    """Scale, project to the tangent space, retract, in place; see ``ops.py``."""
    _check_method("project_retract_", method)
    _check_lists("project_retract_", moved=moved, previous=previous)
    if len(divisors) != len(moved) or not all(0.0 < d < float("inf") for d in divisors):
        raise RuntimeError(f"project_retract_: divisors: wanted positive numbers, one a factor, found {divisors}.")
    if method == "svd" or not _takes(moved):
        return _reference("project_retract_", moved, moved, previous, divisors, method)
    return _of_groups(
        moved,
        lambda at: stiefel.project_retract_(
            [moved[i] for i in at], [previous[i] for i in at], [divisors[i] for i in at], method
        ),
    )


def stella_adamw_(
    factors: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    couplings: list[Tensor],
    hyperparameters: Tensor,
    skip_nonfinite: bool,
) -> Tensor:
    """The whole AdamW step of constrained factors, in place; see ``ops.py``."""
    _check_lists("stella_adamw_", factors=factors, gradients=gradients, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _check_settings(factors, couplings, hyperparameters)
    lists = (factors, gradients, exp_avgs, exp_avg_sqs, couplings)
    if not _takes(factors) or len(_groups(factors)) > 1:
        return _reference("stella_adamw_", factors, *lists, hyperparameters, skip_nonfinite)

    def call(at: list[int]) -> Tensor:
        rows = hyperparameters if len(at) == len(factors) else hyperparameters[at]
        Y, gradient, m, v, K = ([values[i] for i in at] for values in lists)
        return stiefel.stella_adamw_(Y, gradient, m, v, K, rows, skip_nonfinite)

    return _of_groups(factors, call)


def _check_settings(factors: list[Tensor], couplings: list[Tensor], hyperparameters: Tensor) -> None:
    wanted = (len(factors), stiefel.SETTINGS)
    if len(couplings) != len(factors):
        raise RuntimeError(f"stella_adamw_: couplings: found {len(couplings)}, wanted {len(factors)}, one a factor.")
    if tuple(hyperparameters.shape) != wanted or hyperparameters.dtype != torch.float64:
        raise RuntimeError(
            f"stella_adamw_: hyperparameters: found {tuple(hyperparameters.shape)}, {hyperparameters.dtype}, wanted "
            f"{wanted}, float64."
        )
    for i, (K, Y) in enumerate(zip(couplings, factors, strict=True)):
        square = (Y.shape[1], Y.shape[1])
        right = tuple(K.shape) == square and K.dtype in (torch.float32, torch.float64) and K.device == Y.device
        if K.numel() and not right:
            raise RuntimeError(
                f"stella_adamw_: couplings[{i}]: found {tuple(K.shape)}, {K.dtype} on {K.device}, wanted {square}, "
                f"float32 or float64 on {Y.device}, or an empty tensor."
            )


def polar(M: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """The orthogonal polar factor of each matrix of (..., n, r); see ``ops.py``. Waits for the device."""
    _check_method("polar", method)
    _check_factor("polar", "M", M.reshape(-1, *M.shape[-2:])[0] if M.numel() else M.new_empty(M.shape[-2:]))
    n, r = M.shape[-2:]
    if method == "svd" or r > MAX_RANK or not M.numel():
        return _polar_reference(M, method)
    batch = M.reshape(-1, n, r)
    Q, info = stiefel.polar_of(batch)
    info = info.cpu()
    status = info[:, 0]
    if bool(status.any()):
        _finish_polar(batch, Q, info, method)
    return Q.reshape(M.shape), info


def _finish_polar(batch: Tensor, Q: Tensor, info: Tensor, method: str) -> None:
    """Raise for what is not finite; what did not converge, rank deficient all of it, goes to the SVD."""
    bad = (info[:, 0] == ops.STATUS_NON_FINITE).nonzero()
    if len(bad):
        raise RuntimeError(
            f"polar: matrix {int(bad[0])} of M holds NaN or an infinity; the orthogonal polar factor is not defined "
            "for it. Check the values that were passed in."
        )
    left = (info[:, 0] == ops.STATUS_NOT_CONVERGED).nonzero().flatten()
    if method == "newton_schulz":
        raise RuntimeError(
            f"polar: matrix {int(left[0])} of M did not converge by Newton-Schulz: it is rank deficient to working "
            "precision. Use method='auto' or 'svd'."
        )
    factors, rows = _polar_reference(batch[left.to(batch.device)], "svd")
    Q[left.to(Q.device)] = factors
    info[left] = rows


def _polar_reference(M: Tensor, method: str) -> tuple[Tensor, Tensor]:
    serve: Callable[..., Any] = ops.REFERENCE["polar"]
    Q, info = serve(M, method)
    return Q, info


def _reference(operator: str, factors: Sequence[Tensor], *arguments: Any) -> Tensor:
    info = ops.REFERENCE[operator](*arguments)
    assert isinstance(info, Tensor)
    return info.to(factors[0].device) if factors else info


OPERATORS: dict[str, Callable[..., Any]] = {
    "polar": polar,
    "riemannian_gradient_": riemannian_gradient_,
    "project_retract_": project_retract_,
    "stella_adamw_": stella_adamw_,
    **adapter_operators.OPERATORS,
}

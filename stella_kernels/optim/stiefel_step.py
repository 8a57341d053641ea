"""The step of ``attach`` on one factor: what its gradient must be, the retraction, and what is said of failures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checks import NonFiniteError
from ..distributed.attachment import ShardedFactors
from ..distributed.rows import is_sharded
from ..distributed.verdict import refuse_values
from ..nn import StiefelFactor
from ..nn.factors import tolerance_of
from ..operators.status import DRIFT, STATUS_NON_FINITE, STATUS_OK, STATUS_OVERFLOW
from ..reference import stiefel
from . import targets
from .guard import Guard


def check_gradients(
    factors: Sequence[StiefelFactor], gradients: Mapping[int, Tensor], views: Sequence[Tensor] | None
) -> None:
    """Raise for what is not finite, or would not be when it is Riemannian; nothing is written.

    Args:
        factors: all of them.
        gradients: (n, r), by index.
        views: the factors (n, r); None to let overflow be.
    """
    peaks = dict(zip(gradients, targets.peaks([*gradients.values()]), strict=True))
    if bad := [factors[i].name for i, peak in peaks.items() if not peak < math.inf]:
        refuse_non_finite(bad, factors)
    large = []
    for i, peak in peaks.items() if views is not None else ():
        gradient = gradients[i]
        # |Y ∇ᵀY| ≤ sqrt(n r) max |∇|: only past that is it tried
        if views is not None and peak > torch.finfo(gradient.dtype).max / (2.0 + 2.0 * math.sqrt(gradient.numel())):
            tried = [gradient.clone()], [views[i]], [torch.empty_like(views[i])]
            if bool(torch.ops.stella_kernels.riemannian_gradient_(*tried)[0, 0] == STATUS_OVERFLOW):
                large.append(factors[i].name)
    if large:
        refuse_large(large)


def begin_sharded(sharded: ShardedFactors, guard: Guard) -> None:
    """The sums over processes of sharded factors, once nothing in them speaks against the step; nothing is written."""
    given = [f for f in reversed(sharded.everyone) if f.core is not None and is_sharded(f.core)]
    cores: dict[int, Any] = {id(f.core): (f.core, f.name) for f in given}  # the first factor's name
    watched = [(core.grad, name) for core, name in cores.values() if core.grad is not None]
    begun = sharded.begin([grad for grad, _ in watched])
    if begun is None:
        return
    found, factors = begun.verdict, sharded.factors
    if found.values:
        refuse_values([factors[i].name for i in found.values])
    names = [factors[i].name for i in found.gradients]
    names += [f"the S beside {name}" for (_, name), ok in zip(watched, begun.more, strict=True) if not ok]
    if names:
        refuse_non_finite(names, ())
    if guard.judge(factors, found.drifts, "Nothing was changed by this step"):
        sharded.begin([grad for grad, _ in watched])  # from where they were brought back to
    if found.large:
        refuse_large([factors[i].name for i in found.large])


def refuse_large(names: list[str]) -> NoReturn:
    """Raise for gradients that overflow when they are made Riemannian."""
    raise NonFiniteError(
        f"the gradient of {', '.join(names)} is finite and so large that the Riemannian gradient overflows; "
        "nothing was changed. Zero the gradients and look at the loss of this batch, or clip them first.",
        names,
    )


def refuse_non_finite(names: list[str], factors: Sequence[StiefelFactor]) -> NoReturn:
    """Raise for gradients that hold NaN or an infinity, or for a value among ``factors`` that made them so."""
    targets.refuse_values(factors, "Nothing was changed by this step")
    raise NonFiniteError(
        f"the gradient of {', '.join(names)} holds NaN or an infinity, found before the optimizer moved anything. Zero "
        "the gradients and look at the loss of this batch (with float16, step through a GradScaler, which skips such "
        "batches).",
        names,
    )


def refuse_moves(status: Mapping[str, int], method: str) -> NoReturn:
    """Raise for retractions that failed, by name of the factor; all factors were put back."""
    back = (
        "All factors were put back to their values before this step; the other parameters and the optimizer's "
        "state have taken it, so go on from a checkpoint"
    )
    names = [name for name, s in status.items() if s in (STATUS_NON_FINITE, STATUS_OVERFLOW)]
    if names:
        raise NonFiniteError(
            f"optimizer.step() moved {', '.join(names)} to NaN or an infinity, or so far that its retraction "
            f"overflows. {back}, with a lower learning rate.",
            names,
        )
    names = [name for name, s in status.items() if s != STATUS_OK]
    raise RuntimeError(
        f"the polar retraction with method={method!r} did not converge for {', '.join(names)}. {back}, with "
        "method='auto' or 'svd'."
    )


def retract_moved(
    moved: Sequence[Tensor], previous: Sequence[Tensor], divisors: Sequence[float], retraction: str, method: str
) -> Tensor:
    """Steps 3 to 5 of the published step, of each (n, r) in place; one row of info for each."""
    if retraction == "polar":
        return torch.ops.stella_kernels.project_retract_(moved, previous, divisors, method)
    rows: list[list[float]] = []
    for new, old, divisor in zip(moved, previous, divisors, strict=True):
        if not bool(new.isfinite().all()):
            rows.append([STATUS_NON_FINITE, float("nan"), 0.0, float("nan"), 0.0])
            continue
        wide = torch.float32 if new.dtype in targets.HALF_DTYPES else new.dtype
        with torch.autocast(new.device.type, enabled=False):
            Q = stiefel.project_retract(old.to(wide), new.to(wide), divisor, retraction)  # (n, r)
            Q, residual = _corrected(Q, new.dtype, method)
            new.copy_(Q)
        status = STATUS_OK if residual < float("inf") else STATUS_NON_FINITE
        rows.append([status, residual, 0.0, float("nan"), 0.0])
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def retracted(Y: Tensor, move: Tensor, retraction: str, method: str, dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """``move`` (n, r), tangent at Y, retracted, to be stored in ``dtype``; and its row of info."""
    drift = float(stiefel.orthonormality_error(Y))
    if retraction == "polar":
        Q, info = torch.ops.stella_kernels.polar(Y + move, method)
        return Q, [*info[0, :DRIFT].tolist(), drift]
    Q, residual = _corrected(stiefel.RETRACTIONS[retraction](Y, move), dtype, method)
    status = STATUS_OK if residual < float("inf") else STATUS_NON_FINITE
    return Q, [status, residual, 0.0, float("nan"), drift]


def _corrected(Q: Tensor, dtype: torch.dtype, method: str) -> tuple[Tensor, float]:
    """Q, or its polar factor where it is farther off than round-off explains; and its residual as stored in ``dtype``.

    exp_map and cayley keep what a factor is off, and each step rounds it farther off: without bound, in half precision.
    """

    def residual_of(Q: Tensor) -> float:
        return float(stiefel.orthonormality_error(Q.to(dtype).to(Q.dtype)))

    residual = residual_of(Q)
    # half of what is called orthonormal anywhere, so that a result never is not
    if tolerance_of(Q.shape[0], Q.shape[1], dtype) / 2 < residual < float("inf"):
        Q, info = torch.ops.stella_kernels.polar(Q, method)
        residual = residual_of(Q) if int(info[0, 0]) == STATUS_OK else float("inf")
    return Q, residual

"""Who moves a factor: the promise that the geometry is never lost in silence, and the one mechanism that keeps it.

After any step a constrained factor that moved is orthonormal to round-off, or the step that would have trained it
wrongly has raised an error that names factor, cause and cure. No optimizer, wrapper or engine is trusted for it. As a
step begins, the distance ``‖YᵀY − I‖`` of a factor from its manifold says whether anybody moved it since the last
retraction (docs/design.md 3.8), and it is had in two ways:

- a factor whose memory or version counter is not as the last step left it is measured before anything else happens;
- of every other one the kernels form YᵀY anyway and report the distance with their result (``info``'s ``drift``): a
  write to ``.data`` leaves no other trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import OffManifoldError, check_choice
from ..distributed import measures
from ..distributed.rows import is_sharded
from ..nn import StiefelFactor, lost_masters, orthonormality_tolerance
from ..operators.memory import has_memory
from . import targets

POLICIES = ("error", "retract")


@dataclass(slots=True)
class _Mark:
    """How a step, or the attaching, left a factor; a step asks each factor, hence the two that cost least to ask."""

    pointer: int
    version: int
    shape: torch.Size
    slack: float  # round-off of any retraction to such a factor
    residual: float  # ‖QᵀQ − I‖ that the last retraction reported

    @property
    def allowed(self) -> float:
        """The ``‖YᵀY − I‖`` that may be found as the next step begins."""
        return 2.0 * self.residual + self.slack


class Guard:
    """Watches factors from step to step.

    Args:
        policy: 'error', or 'retract': a factor that somebody moved is replaced by its orthogonal polar factor before
            the step, which then starts there.
    """

    def __init__(self, factors: Iterable[StiefelFactor], policy: str) -> None:
        check_choice("on_foreign_move", policy, POLICIES)
        self.policy = policy
        self._marks: dict[int, _Mark] = {}
        self._all: list[tuple[StiefelFactor, nn.Parameter, _Mark]] = []  # what a step goes through, hundreds of them
        self._allowed_to_all = math.inf
        self.watch(factors)

    def watch(self, factors: Iterable[StiefelFactor]) -> None:
        """From now on these too, which were just found to be orthonormal."""
        for factor in factors:
            p, found = factor.parameter, orthonormality_tolerance(factor) / 2
            mark = self._marks[id(p)] = _Mark(*_trace(p), p.shape, _round_off(factor), found)
            if not is_sharded(p):  # else every step measures it
                self._all.append((factor, p, mark))
        self._allowed_to_all = min((mark.slack for mark in self._marks.values()), default=math.inf)

    def watches(self, factor: StiefelFactor) -> bool:
        """Whether it is one of them."""
        return id(factor.parameter) in self._marks

    def untouched(self, factor: StiefelFactor) -> bool:
        """Whether memory and version counter are as the last step left them."""
        parameter = factor.parameter
        mark = self._marks[id(parameter)]
        return (mark.pointer, mark.version) == _trace(parameter)

    def off_manifold(self, factor: StiefelFactor) -> bool:
        """Whether it is farther from its manifold than the last step left it; measured."""
        return not measures.distances([factor])[0] <= self._marks[id(factor.parameter)].allowed

    def refuse_far(self, factors: Iterable[StiefelFactor], state: str) -> None:
        """Raise for those that are off their manifold, where a step has overflowed; ``state`` says what has changed.

        Raises:
            OffManifoldError: that.
        """
        if names := [f.name for f in factors if self.off_manifold(f)]:
            raise OffManifoldError(
                f"the value of {', '.join(names)} is so far off its manifold that a step overflows: something other "
                f"than this optimizer's step wrote to its .data. {state}; load a sound checkpoint.",
                names,
            )

    def before_step(self, every: bool = False, members: Callable[[], Iterable[StiefelFactor]] = list) -> None:
        """Measure what was touched, or all; nothing else has happened yet.

        ``members`` are the model's factors as it has them now: ``model.to(dtype)`` changes what it promises of them.

        Raises:
            OffManifoldError, NonFiniteError: a factor is off its manifold; under 'retract' only where it cannot be
                brought back.
        """
        touched = [
            f
            for f, p, mark in self._all
            if every or mark.version != p._version or mark.pointer != p.data_ptr()  # as ``untouched``
        ]
        if not touched:
            return
        # one that is frozen and has no gradient is nobody's business until it trains again
        touched = [f for f in touched if f.parameter.requires_grad or f.parameter.grad is not None]
        for factor in touched:
            shape = self._marks[id(factor.parameter)].shape
            if factor.parameter.shape != shape or not has_memory(factor.parameter):
                raise OffManifoldError(
                    f"{factor.name}: found shape {tuple(factor.parameter.shape)} with a storage of "
                    f"{factor.parameter.untyped_storage().nbytes()} bytes as optimizer.step() began, wanted "
                    f"{tuple(shape)} in memory: something took its memory away, as an offload does. Bring it back "
                    "first.",
                    [factor.name],
                )
        for factor in touched:
            slack = self._marks[id(factor.parameter)].slack = _round_off(factor)  # of another dtype perhaps
            self._allowed_to_all = min(self._allowed_to_all, slack)
        if lost_masters(touched):
            promised = {id(f.parameter): f.master for f in members()}
            targets.check_masters([replace(f, master=promised.get(id(f.parameter), f.master)) for f in touched])
        self.judge(touched, measures.distances(touched), "Nothing was changed by this step")
        self.settle(touched)

    def judge(self, factors: Sequence[StiefelFactor], drifts: Sequence[float], state: str) -> bool:
        """Raise for factors found farther from their manifolds than the last step left them, or retract those.

        Returns whether any was retracted.

        Args:
            factors: those measured.
            drifts: ``‖YᵀY − I‖`` of each, as the step began.
            state: what has become of the step, for the message.
        """
        if all(map(self._allowed_to_all.__ge__, drifts)):  # False of NaN
            return False
        marks = self._marks
        off = [(f, d) for f, d in zip(factors, drifts, strict=True) if not d <= marks[id(f.parameter)].allowed]
        if not off:
            return False
        targets.refuse_values([f for f, d in off if not math.isfinite(d)], state)
        if self.policy == "retract":
            retract([f for f, _ in off])
            return True
        # of a finite value, however large, that no sum of squares can hold
        worst, drift = max(((f, d if d < math.inf else math.inf) for f, d in off), key=lambda each: each[1])
        names = [f.name for f, _ in off]
        raise OffManifoldError(
            f"{', '.join(names)}: found ‖QᵀQ − I‖ = {drift:.3g} ({worst.name}) as optimizer.step() began, wanted at "
            f"most {self._marks[id(worst.parameter)].allowed:.3g}, where its last retraction left it: something other "
            "than this optimizer's step moved it since. That may be a wrapper that averages or interpolates "
            "parameters, an optimizer that steps inside backward, a cast or a write to .data, or a checkpoint of "
            f"another method. {state}. Keep it away from the constrained factors, or pass on_foreign_move='retract' to "
            "have them brought back at each step; stella_kernels.optim.retract(model) does it once.",
            names,
        )

    def after_step(self, factors: Sequence[StiefelFactor], residuals: Sequence[float]) -> None:
        """Remember how a step left them; ``residuals`` are ``‖QᵀQ − I‖`` of its retractions.

        Sharded ones are to be settled besides.
        """
        moved = self._all
        if len(factors) != len(moved) or (moved and factors[0] is not moved[0][0]):
            moved = [(f, f.parameter, self._marks[id(f.parameter)]) for f in factors]
        for (_, p, mark), residual in zip(moved, residuals, strict=True):
            mark.pointer = p.data_ptr()
            mark.version = p._version
            mark.residual = residual

    def settle(self, factors: Iterable[StiefelFactor]) -> None:
        """These were put back, or written by the step itself without moving: as they are, with what was allowed."""
        for factor in factors:
            mark = self._marks[id(factor.parameter)]
            mark.pointer, mark.version = _trace(factor.parameter)


def _trace(parameter: Any) -> tuple[int, int]:
    """Address and version counter, which tell of most writes; of the own part of a sharded parameter."""
    local = parameter.detach().to_local() if is_sharded(parameter) else parameter
    return local.data_ptr(), local._version


def _round_off(factor: StiefelFactor) -> float:
    """What may be found of a factor beyond what its retraction reported.

    Rounding its result to storage moves QᵀQ by at most 2 u sqrt(r) with u = eps / 2, and forming YᵀY in the
    arithmetic's dtype errs by some w sqrt(r) (block sums, round-offs of random sign); both several times over.
    """
    r = factor.view.shape[1]
    dtype = factor.parameter.dtype
    w = torch.finfo(torch.float32 if dtype in targets.HALF_DTYPES else dtype).eps
    return (4 * torch.finfo(dtype).eps + 32 * w) * math.sqrt(r)


@torch.no_grad()
def retract(target: nn.Module | Iterable[StiefelFactor | nn.Parameter]) -> None:
    """Replace each factor by its orthogonal polar factor, the nearest point of its manifold, in place.

    For factors that something other than the optimizer has moved: averaged weights, an edited checkpoint.

    Args:
        target: a model with StelLA adapters (its trainable factors), or a sequence of ``StiefelFactor`` or of tall
            parameters (n, r), n > r; any dtype and device.

    Raises:
        NonFiniteError: a factor holds NaN or an infinity; none is changed.
        OffManifoldError: the columns of a factor are linearly dependent, so that no point is nearest; none is changed.
        TypeError, ValueError: what is no factor, as for ``attach``.
    """
    factors = targets.resolve_factors(target)
    targets.check_shapes(factors)
    targets.refuse_values(factors, "Nothing was changed")
    sharded = [f for f in factors if is_sharded(f.parameter)]
    factors = [f for f in factors if not is_sharded(f.parameter)]
    wide = [f.view.float() if f.parameter.dtype in targets.HALF_DTYPES else f.view for f in factors]
    results = [torch.ops.stella_kernels.polar(Y, "auto")[0] for Y in wide]
    for factor, Y, Q in zip(factors, wide, results, strict=True):
        if (rank := _rank(Q, Y)) < Q.shape[1]:
            raise OffManifoldError(
                f"{factor.name}: found {rank} linearly independent columns of {Q.shape[1]}, wanted all: such a factor "
                "has no nearest point of its manifold. Nothing was changed; load a sound checkpoint, or initialise it "
                "again.",
                [factor.name],
            )
    if sharded and (bad := measures.retract(sharded)):
        raise OffManifoldError(
            f"{', '.join(bad)}: found values that are not finite or columns that are linearly dependent, wanted "
            "independent ones: such a factor has no nearest point of its manifold. Nothing was changed; load a sound "
            "checkpoint, or initialise it again.",
            bad,
        )
    for factor, Q in zip(factors, results, strict=True):
        factor.view.copy_(Q)


def _rank(Q: Tensor, Y: Tensor) -> int:
    """Of Y (n, r), by the eigenvalues of ``QᵀY``, its symmetric factor beside the orthogonal one."""
    with torch.autocast(Y.device.type, enabled=False):
        H = Q.double().mT @ Y.double()  # (r, r)
        values = torch.linalg.eigvalsh((H + H.mT) / 2)
    return int((values > 8 * torch.finfo(Y.dtype).eps * values.max().clamp_min(0)).sum())

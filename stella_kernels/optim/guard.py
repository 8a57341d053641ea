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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..checks import NonFiniteError, OffManifoldError, check_choice
from ..nn import StiefelFactor, orthonormality_tolerance
from ..reference import stiefel
from . import targets

POLICIES = ("error", "retract")


@dataclass(slots=True)
class _Mark:
    """How a step, or the attaching, left a factor; a step asks each factor, hence the two that cost least to ask."""

    pointer: int
    version: int
    shape: torch.Size
    slack: float  # round-off of any retraction to such a factor
    allowed: float  # ‖YᵀY − I‖ that may be found as the next step begins


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
        self.watch(factors)

    def watch(self, factors: Iterable[StiefelFactor]) -> None:
        """From now on these too, which were just found to be orthonormal."""
        for factor in factors:
            p, allowed = factor.parameter, orthonormality_tolerance(factor)
            self._marks[id(p)] = _Mark(p.data_ptr(), p._version, p.shape, _round_off(factor), allowed)

    def watches(self, factor: StiefelFactor) -> bool:
        """Whether it is one of them."""
        return id(factor.parameter) in self._marks

    def untouched(self, factor: StiefelFactor) -> bool:
        """Whether memory and version counter are as the last step left them."""
        parameter = factor.parameter
        mark = self._marks[id(parameter)]
        return mark.version == parameter._version and mark.pointer == parameter.data_ptr()

    def off_manifold(self, factor: StiefelFactor) -> bool:
        """Whether it is farther from its manifold than the last step left it; measured."""
        return not distance(factor) <= self._marks[id(factor.parameter)].allowed

    def before_step(self, factors: Sequence[StiefelFactor], every: bool = False) -> None:
        """Measure what was touched, or all; nothing else has happened yet.

        Raises:
            OffManifoldError, NonFiniteError: a factor is off its manifold; under 'retract' only where it cannot be
                brought back.
        """
        marks = self._marks
        touched = [
            f
            for f in factors
            if every
            or (mark := marks[id(p := f.parameter)]).version != p._version
            or mark.pointer != p.data_ptr()  # as ``untouched``, hundreds of times a step
        ]
        if not touched:
            return
        for factor in touched:
            shape = self._marks[id(factor.parameter)].shape
            if factor.parameter.shape != shape:
                raise OffManifoldError(
                    f"{factor.name}: found shape {tuple(factor.parameter.shape)} as optimizer.step() began, wanted "
                    f"{tuple(shape)}: something took its memory away, as an offload does. Bring it back first.",
                    [factor.name],
                )
        for factor in touched:
            self._marks[id(factor.parameter)].slack = _round_off(factor)  # of another dtype perhaps
        targets.check_masters(touched)
        self.judge(touched, [distance(f) for f in touched], "Nothing was changed by this step")
        self.settle(touched)

    def judge(self, factors: Sequence[StiefelFactor], drifts: Sequence[float], state: str) -> None:
        """Raise for factors found farther from their manifolds than the last step left them, or retract those.

        Args:
            factors: those measured.
            drifts: ``‖YᵀY − I‖`` of each, as the step began.
            state: what has become of the step, for the message.
        """
        marks = self._marks
        off = [(f, d) for f, d in zip(factors, drifts, strict=True) if not d <= marks[id(f.parameter)].allowed]
        if not off:
            return
        broken = [f.name for f, d in off if not math.isfinite(d)]
        if broken:
            raise NonFiniteError(
                f"the value of {', '.join(broken)} holds NaN or an infinity, found as optimizer.step() began. {state}; "
                "load a sound checkpoint.",
                broken,
            )
        if self.policy == "retract":
            retract([f for f, _ in off])
            return
        worst, drift = max(off, key=lambda each: each[1])
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
        """Remember how a step left them; ``residuals`` are ``‖QᵀQ − I‖`` of its retractions."""
        marks = self._marks
        for factor, residual in zip(factors, residuals, strict=True):
            p = factor.parameter
            mark = marks[id(p)]
            mark.pointer = p.data_ptr()
            mark.version = p._version
            mark.allowed = 2.0 * residual + mark.slack

    def settle(self, factors: Iterable[StiefelFactor]) -> None:
        """These were put back, or written by the step itself without moving: as they are, with what was allowed."""
        for factor in factors:
            mark = self._marks[id(factor.parameter)]
            mark.pointer, mark.version = factor.parameter.data_ptr(), factor.parameter._version


def _round_off(factor: StiefelFactor) -> float:
    """What may be found of a factor beyond what its retraction reported.

    Rounding its result to storage moves QᵀQ by at most 2 u sqrt(r) with u = eps / 2, and forming YᵀY in the
    arithmetic's dtype errs by some w sqrt(r) (block sums, round-offs of random sign); both several times over.
    """
    r = factor.view.shape[1]
    dtype = factor.parameter.dtype
    w = torch.finfo(torch.float32 if dtype in targets.HALF_DTYPES else dtype).eps
    return (4 * torch.finfo(dtype).eps + 32 * w) * math.sqrt(r)


def distance(factor: StiefelFactor) -> float:
    """‖YᵀY − I‖ in Frobenius norm, in float32 at least and outside autocast."""
    view = factor.view.float() if factor.parameter.dtype in targets.HALF_DTYPES else factor.view
    with torch.autocast(view.device.type, enabled=False):
        return float(stiefel.orthonormality_error(view))


@torch.no_grad()
def retract(target: nn.Module | Iterable[StiefelFactor | nn.Parameter]) -> None:
    """Replace each factor by its orthogonal polar factor, the nearest point of its manifold, in place.

    For factors that something other than the optimizer has moved: averaged weights, an edited checkpoint.

    Args:
        target: a model with StelLA adapters (its trainable factors), or a sequence of ``StiefelFactor`` or of tall
            parameters (n, r), n > r; any dtype and device.

    Raises:
        RuntimeError: a factor holds NaN or an infinity; none is changed.
        TypeError, ValueError: what is no factor, as for ``attach``.
    """
    factors = targets.resolve_factors(target)
    targets.check_shapes(factors)
    results = [torch.ops.stella_kernels.polar(f.view, "auto")[0] for f in factors]
    for factor, Q in zip(factors, results, strict=True):
        factor.view.copy_(Q)

"""The Riemannian AdamW step of sharded factors: two sums over processes, no factor gathered (docs/design.md 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nn import StiefelFactor
from ..operators.status import STATUS_OK
from ..reference import stiefel
from .reduction import Call, calls_of, summed
from .retraction import info_of, polish
from .rows import Rows, is_sharded
from .verdict import Verdict, refuse_values, verdict

_kernels = torch.ops.stella_kernels


@dataclass
class Begun:
    """A step of which nothing is written yet.

    Attributes:
        verdict: what the sums say, of the factors in their order.
        more: of the tensors that were watched besides, whether all processes' parts are finite.
    """

    rows: list[Rows]
    calls: list[Call]
    gradients: list[Tensor]
    held: list[Tensor]
    sums: list[Tensor]
    verdict: Verdict
    more: list[bool]


def begin(factors: Sequence[Rows], squares: bool, watched: Sequence[Tensor] = ()) -> Begun:
    """The first sums: ∇ᵀY and YᵀY of all factors.

    Args:
        factors: those that have a gradient.
        squares: whether gradients are to be squared, and must not overflow then.
        watched: sharded gradients of other parameters, to be asked along with these whether they are finite.
    """
    rows, calls = list(factors), calls_of(factors)
    grads: list[Any] = [each.factor.parameter.grad for each in rows]
    gradients = [each.of(grad) for each, grad in zip(rows, grads, strict=True)]
    held = [each.of(each.factor.parameter.detach()) for each in rows]  # type: ignore[arg-type]
    flats = [_kernels.gradient_gram(*call.chosen(gradients, held)) for call in calls]
    # one word each: 0, or NaN where an element of this process's part is not finite
    local = [(t.to_local() if hasattr(t, "to_local") else t).float() for t in watched]
    sums, more = summed(calls, flats, [(t * 0.0).sum() for t in local])
    finite = [value == 0.0 for value in more.tolist()]
    return Begun(rows, calls, gradients, held, sums, verdict(calls, sums, squares), finite)


def finish(begun: Begun, states: Sequence[dict[str, Any]], settings: Sequence[Sequence[float]]) -> Tensor:
    """Moments, the second sums, solve and update; info, a row for each factor, the same on every process.

    Args:
        states: of each factor, ``exp_avg`` and ``exp_avg_sq``; written.
        settings: rows of stella_adamw_'s hyperparameters.
    """
    firsts = [each.of(state["exp_avg"]) for each, state in zip(begun.rows, states, strict=True)]
    seconds = [each.of(state["exp_avg_sq"]) for each, state in zip(begun.rows, states, strict=True)]
    flats, steps = [], []
    for call, sums in zip(begun.calls, begun.sums, strict=True):
        hyperparameters = torch.tensor(call.chosen(settings)[0], dtype=torch.float64, device="cpu")
        lists = call.chosen(begun.held, begun.gradients, firsts, seconds)
        grams, step = _kernels.adamw_gram_(*lists, sums, hyperparameters)
        flats.append(grams)
        steps.append(step)
    reduced, _ = summed(begun.calls, flats)
    infos = [
        _kernels.adamw_rows_(*call.chosen(begun.held), step, sums, grams)
        for call, step, sums, grams in zip(begun.calls, steps, begun.sums, reduced, strict=True)
    ]
    info = polish(begun.rows, begun.held, info_of(begun.calls, infos))
    for each, held, m, v, state in zip(begun.rows, begun.held, firsts, seconds, states, strict=True):
        parameter: Any = each.factor.parameter
        each.put(held, parameter.detach())
        for key, rows in (("exp_avg", m), ("exp_avg_sq", v)):
            if not each.holds(state[key]):
                state[key] = each.wrapped(rows, parameter)  # loaded as another placement: by rows from now on
    return info


class ShardedSlot:
    """A constrained factor whose rows are spread over processes, and the group of the optimizer that holds it."""

    def __init__(self, index: int, factor: StiefelFactor, hidden_size: float | None) -> None:
        self.index = index
        self.factor = factor
        self.parameter: Any = factor.parameter
        self.group = 0
        self.rows = Rows(factor)
        self.divisor = stiefel.gradient_scaling_divisor(self.rows.n, hidden_size)


class ShardedAdamW:
    """What StellaAdamW does with such factors.

    Args:
        slots: of them.
    """

    def __init__(self, slots: Sequence[ShardedSlot]) -> None:
        self.slots = list(slots)
        self.active: list[ShardedSlot] = []
        self._begun: Begun | None = None

    def begin(self, free: Sequence[Tensor], state: dict[Any, Any]) -> list[str]:
        """The first sums; names of what has a gradient that is not finite, ``free`` parameters among them.

        Raises:
            NonFiniteError: a factor holds NaN or an infinity.
            ValueError: a moment is not sharded as its factor is.
        """
        self.active = [slot for slot in self.slots if slot.parameter.grad is not None]
        self._begun = None
        if not self.active:
            return []
        for slot in self.active:
            check_state(slot.rows, state.get(slot.parameter) or {})
        cores = {
            id(slot.factor.core): slot.factor.name for slot in reversed(self.slots) if slot.factor.core is not None
        }
        watched = [p for p in free if is_sharded(p)]
        grads: list[Any] = [p.grad for p in watched]
        self._begun = begun = begin([slot.rows for slot in self.active], True, grads)
        if begun.verdict.values:
            refuse_values([self.active[i].factor.name for i in begun.verdict.values])
        causes = [self.active[i].factor.name for i in begun.verdict.gradients]
        for p, finite in zip(watched, begun.more, strict=True):
            if not finite:
                causes.append(f"S beside {cores[id(p)]}" if id(p) in cores else f"a parameter of {tuple(p.shape)}")
        return causes

    @property
    def factors(self) -> list[StiefelFactor]:
        """The active ones."""
        return [slot.factor for slot in self.active]

    @property
    def large(self) -> list[ShardedSlot]:
        """Those whose moments may overflow."""
        return [] if self._begun is None else [self.active[i] for i in self._begun.verdict.large]

    @property
    def drifts(self) -> list[float]:
        """``‖YᵀY − I‖`` of the active factors, as the step begins."""
        return [] if self._begun is None else self._begun.verdict.drifts

    def finish(self, state: dict[Any, Any], groups: Sequence[dict[str, Any]]) -> Tensor:
        """The step of the active factors; info, a row for each. Of those with a status nothing is booked."""
        begun, self._begun = self._begun, None
        assert begun is not None
        states = [state.get(slot.parameter) or fresh_state(slot.rows) for slot in self.active]
        settings = []
        for slot, kept in zip(self.active, states, strict=True):
            group = groups[slot.group]
            beta1, beta2 = group["betas"]
            sign = -1.0 if group["maximize"] else 1.0
            settings.append(
                [*map(float, (group["lr"], beta1, beta2, group["eps"], kept["step"].item() + 1.0)), slot.divisor, sign]
            )
        info = finish(begun, states, settings)
        for slot, kept, found in zip(self.active, states, info.tolist(), strict=True):
            if found[0] == STATUS_OK:
                kept["step"] += 1
                state[slot.parameter] = kept
        return info


def check_state(rows: Rows, state: dict[str, Any]) -> None:
    """Raise ``ValueError`` for moments that are not over all processes, or of another shape or dtype."""
    p = rows.factor.parameter
    for key in ("exp_avg", "exp_avg_sq"):
        moment = state.get(key)
        if moment is not None and (not is_sharded(moment) or (moment.shape, moment.dtype) != (p.shape, p.dtype)):
            raise ValueError(
                f"{rows.name}: found a moment {key} of {tuple(moment.shape)}, {moment.dtype}, a "
                f"{type(moment).__name__}, beside a sharded factor of {tuple(p.shape)}, {p.dtype}, wanted a DTensor "
                "like it: load the optimizer's state by "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
            )


def fresh_state(rows: Rows) -> dict[str, Any]:
    """Of a factor before its first step, as torch's AdamW has it."""
    scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return {
        "step": torch.tensor(0.0, dtype=scalar, device="cpu"),
        "exp_avg": rows.zeros(),
        "exp_avg_sq": rows.zeros(),
    }

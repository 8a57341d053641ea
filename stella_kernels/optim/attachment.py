"""What ``attach`` does around each step of an optimizer."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import measures
from ..distributed.attachment import ShardedFactors
from ..distributed.rows import is_sharded
from ..nn import StiefelFactor
from ..operators.status import DRIFT, INFO_COLUMNS, RESIDUAL, STATUS_OK, STATUS_OVERFLOW
from ..reference import stiefel
from . import targets, wrappers
from .guard import Guard
from .interruption import Postponed
from .memory import Memory
from .quotient import Product, QuotientStep
from .roster import Family, Roster
from .stiefel_step import begin_sharded, check_gradients, refuse_large, refuse_moves, refuse_non_finite, retract_moved

# Which attachments an optimizer has; weak on both sides, so that neither is kept alive.
_attachments: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Attachment]] = weakref.WeakKeyDictionary()

_numbers = itertools.count()

_REWRITTEN = "No parameter was moved by this step; its gradients may be rewritten already, so zero them"


def attachments_of(optimizer: Optimizer) -> list[Attachment]:
    """Those that are in force."""
    return list(_attachments.get(optimizer, ()))


@dataclass(frozen=True)
class Settings:
    """How ``attach`` was called, as far as a step needs it."""

    retraction: str
    hidden_size: float | None
    geometry: str
    method: str
    on_foreign_move: str


class Attachment:
    """What ``attach`` did to an optimizer, until ``remove()``.

    Attributes:
        factors: the factors that are kept on their manifolds, in order; those that join later come last.
        last_info: of the last step, (k, 5) float64 on the CPU, a row for each factor that had a gradient: status,
            ``‖QᵀQ − I‖`` (an upper bound), iterations, path (NaN where the retraction is not 'polar'), and the distance
            from the manifold as the step began. None before the first step.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        target: object,
        factors: Sequence[StiefelFactor],
        settings: Settings,
        products: Sequence[Product] = (),
    ) -> None:
        self.factors: tuple[StiefelFactor, ...] = ()
        self.last_info: Tensor | None = None
        self._settings = settings
        self._optimizers = [weakref.ref(one) for one in optimizers]  # outermost first
        self._roster = Roster(target if isinstance(target, Family) else Family(target), optimizers[0])
        self._guard = Guard((), settings.on_foreign_move)
        self._constrained: dict[int, str] = {}  # id of the parameter: name
        self._memory = Memory()
        self._sharded = ShardedFactors()
        self._divisors: list[float] = []
        self._number = next(_numbers)  # in the order of hooks
        self._planned: tuple[list[int], dict[int, Tensor]] | None = None  # checked, and not rewritten yet
        self._active: list[int] | None = None  # factors of the step under way, between the two hooks
        self._drift = torch.empty(0, device="cpu")
        self._unevaluated = False  # a closure was given to the step under way, and not called yet
        self._quotient = QuotientStep(products, settings.retraction, settings.method) if products else None
        references = self._optimizers
        self._postponed = Postponed(lambda frame: wrappers.steps_under_way(_alive(references), frame) > 0)
        self._constrain(factors)
        self._hooks = []
        for one in optimizers if settings.geometry != "euclidean" else ():
            self._hooks.append(one.register_step_pre_hook(self._before_step))
            self._hooks.append(one.register_step_post_hook(self._after_step))
        for one in optimizers:
            _attachments.setdefault(one, weakref.WeakSet()).add(self)
            if self._hooks:
                wrappers.copies_through(one, partial(_when_copied, weakref.ref(one)), Attachment)

    def remove(self) -> None:
        """Take the hooks off the optimizer; the factors keep their values. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        for other in self._company():
            other._planned = None
        self._hooks.clear()
        self._active = None
        self._memory.forget()
        for one in self._alive():
            _attachments.get(one, weakref.WeakSet()).discard(self)
            if not attachments_of(one):
                wrappers.copies_plainly(one)

    def _alive(self) -> list[Optimizer]:
        return _alive(self._optimizers)

    def _constrain(self, factors: Sequence[StiefelFactor]) -> None:
        self.factors += tuple(factors)
        self._roster.constrain(self.factors)
        for factor in factors:
            self._constrained[id(factor.parameter)] = factor.name
            self._divisors.append(stiefel.gradient_scaling_divisor(factor.view.shape[0], self._settings.hidden_size))
            if is_sharded(factor.parameter):
                self._sharded.add(len(self._divisors) - 1, factor, self._divisors[-1])
        self._memory.add(factors)
        self._guard.watch(factors)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if wrappers.steps_under_way(self._alive()) > 1:
            return None  # inside another step, which is the one
        self._finish_interrupted_step()
        self._unevaluated = False
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            targets.check_no_weight_decay(optimizer, self._constrained)
            return None  # a fused optimizer under GradScaler, which is about to skip this step by itself
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._begin(optimizer)
            self._postponed.begin()
            return None
        self._look(optimizer)
        self._unevaluated = True
        self._postponed.begin()
        evaluate = wrappers.followed(closure, partial(self._after_closure, optimizer), self._postponed.end)
        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    @torch.no_grad()
    def _after_closure(self, optimizer: Optimizer) -> None:
        """The gradients are made Riemannian; only at the point where the step began."""
        if not all(map(self._guard.untouched, self.factors)):
            if self._active is not None:
                self._restore(self._active)
                self._guard.settle(self.factors)
                self._active = None
            wrappers.refuse_second_evaluation()
        self._unevaluated = False
        self._begin(optimizer)

    def _company(self) -> list[Attachment]:
        """Those that act on the same optimizers, in the order in which their hooks run; this one too."""
        return sorted({a for one in self._alive() for a in attachments_of(one) if a._hooks}, key=lambda a: a._number)

    def _begin(self, optimizer: Optimizer) -> None:
        """Checks and rewrites the gradients, and keeps the factors as they are.

        The first of several attachments checks what all of them are to rewrite, so that an error leaves no half.
        """
        company = self._company()
        try:
            if self._planned is None or self._exchanged(self._planned[1]):
                for one in company[company.index(self) :]:
                    one._planned = one._plan(optimizer if one is self else one._alive()[0], len(company) == 1)
            active, gradients = self._planned or ([], {})
            self._planned = None
            self._rewrite(active, gradients)
        except BaseException:
            for one in company:
                one._planned = None
            raise

    def _exchanged(self, gradients: dict[int, Tensor]) -> bool:
        """Whether a hook that ran since they were looked at has given factors other gradients."""
        now = {i: f.parameter.grad.data_ptr() for i, f in enumerate(self.factors) if f.parameter.grad is not None}
        return now != {i: gradient.data_ptr() for i, gradient in gradients.items()}

    def _look(self, optimizer: Optimizer) -> None:
        """What can be asked before there are gradients."""
        targets.check_no_weight_decay(optimizer, self._constrained)
        self._guard.before_step(self._quotient is not None, self._roster.family.members)

    def _plan(self, optimizer: Optimizer, alone: bool) -> tuple[list[int], dict[int, Tensor]]:
        """The factors that this step moves and their gradients (n, r), once nothing speaks against it."""
        self._finish_interrupted_step()
        self._look(optimizer)
        attached = attachments_of(optimizer)
        elsewhere = {i for a in attached if a is not self for i in a._constrained} if len(attached) > 1 else {}
        moving, held = [], 0
        for parameters in [group["params"] for group in optimizer.param_groups]:
            for parameter in parameters:
                if id(parameter) in self._constrained:
                    held += 1
                elif parameter.grad is not None and id(parameter) not in elsewhere:
                    moving.append(parameter)
        if successors := self._roster.successors(self.factors, held):
            self._admit(optimizer, successors, anew=True)
            return self._plan(optimizer, alone)
        self._roster.check_held(self.factors, held)
        if new := self._roster.newcomers(moving):
            self._admit(optimizer, new)
        moved = [(i, is_sharded(f.parameter)) for i, f in enumerate(self.factors) if f.parameter.grad is not None]
        self._roster.check_moving(self.factors, len(moved))
        active = [i for i, sharded in moved if not sharded]
        self._memory.follow(active)
        gradients = {i: targets.tall_gradient(self.factors[i]) for i in active}
        targets.check_finite_cores([self.factors[i] for i in active], self.factors)
        # one call of the operator writes nothing when it finds a fault; before several, all are looked at
        if self._quotient is not None or not alone or len(self._memory.groups(active)) > 1:
            exact = self._quotient is None
            check_gradients(self.factors, gradients, self._memory.views if exact else None)
        if self._quotient is not None:
            self._quotient.prepare(gradients, self._memory.views)
        begin_sharded(self._sharded, self._guard)
        return active, gradients

    def _rewrite(self, active: list[int], gradients: dict[int, Tensor]) -> None:
        drift = torch.zeros(len(self.factors), dtype=torch.float64, device="cpu")
        if self._quotient is not None:
            self._quotient.make_riemannian()
        groups = self._memory.groups(active)
        for group in groups if self._quotient is None else ():
            while bool((info := self._riemannian(group, gradients))[:, 0].any()):
                self._refuse_gradients(group, info[:, 0].tolist())
            drift[group] = info[:, DRIFT]
        for group in groups if self._quotient is not None else ():
            torch._foreach_copy_([self._memory.snapshot(i) for i in group], [self._memory.views[i] for i in group])
        self._judge_drift(active, drift)
        self._sharded.rewrite()
        self._drift = drift
        self._active = active

    def _riemannian(self, group: list[int], gradients: dict[int, Tensor]) -> Tensor:
        return torch.ops.stella_kernels.riemannian_gradient_(
            [gradients[i] for i in group],
            [self._memory.views[i] for i in group],
            [self._memory.snapshot(i) for i in group],
        ).cpu()

    def _admit(self, optimizer: Optimizer, new: Sequence[StiefelFactor], anew: bool = False) -> None:
        """Factors that the optimizer is about to move for the first time, or ``anew`` those in the places of all."""
        if self._quotient is not None:
            raise ValueError(
                f"optimizer: {', '.join(f.name for f in new)} began to train after attach, which geometry='quotient' "
                "cannot take up; remove() the attachment and attach again."
            )
        targets.check_admissible(optimizer, new)
        if anew:
            self.factors, self._divisors = (), []
            self._memory, self._sharded, self._constrained = Memory(), ShardedFactors(), {}
            self._guard = Guard((), self._settings.on_foreign_move)
        self._constrain(new)

    def _judge_drift(self, active: list[int], drift: Tensor) -> None:
        """What the kernels saw, which no version counter shows: a write to ``.data``."""
        factors = [self.factors[i] for i in active]
        before = [f.parameter._version for f in factors]
        self._guard.judge(factors, drift[active].tolist(), _REWRITTEN)
        for i, factor, version in zip(active, factors, before, strict=True):
            if factor.parameter._version != version:  # retracted
                self._memory.snapshot(i).copy_(self._memory.views[i])
        self._guard.settle(factors)

    def _refuse_gradients(self, group: list[int], status: list[float]) -> None:
        """Raise; or, where a value was at fault and the policy is to retract it, return for another try."""
        bad = [i for i, s in zip(group, status, strict=True) if s != STATUS_OK]
        factors = [self.factors[i] for i in bad]
        off = [f for f in factors if self._guard.off_manifold(f)]
        self._guard.judge(off, measures.distances(off), _REWRITTEN)
        if off:
            self._guard.settle(off)
            return
        if large := [self.factors[i].name for i, s in zip(group, status, strict=True) if s == STATUS_OVERFLOW]:
            refuse_large(large)
        refuse_non_finite([f.name for f in factors], self.factors)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if wrappers.steps_under_way(self._alive()) > 1:
            return
        try:
            if self._unevaluated:
                self._unevaluated = False
                self._guard.before_step()  # it moved nothing, or says so
            elif self._active is not None:
                self._retract_together()
        finally:
            self._postponed.end()

    def _retract_together(self) -> None:
        """What this and the other attachments to the same step moved; where one fails, all are put back."""
        outermost = self._alive()[0]
        taken = [(a, a._active) for a in self._company() if a._active is not None and a._alive()[0] is outermost]
        for one, _ in taken:
            one._active = None
        try:
            for one, active in taken:
                one._retract_moved(active)
        except BaseException:
            for one, active in taken:
                one._restore(active)
                one._postponed.end()
            raise

    def _retract_moved(self, active: list[int]) -> None:
        self._memory.follow(active)
        info = torch.zeros(len(self.factors), INFO_COLUMNS, dtype=torch.float64, device="cpu")
        try:
            if self._quotient is not None:
                before = {i: self._memory.snapshot(i) for i in active}
                info[active] = self._quotient.retract(before, self._memory.views, self._divisors)
            for group in self._memory.groups(active) if self._quotient is None else ():
                info[group] = self._retract(group).to(info.device)
            if self._quotient is None:
                info[:, DRIFT] = self._drift
            if self._sharded.active:
                info[self._sharded.active] = self._sharded.retract()
        except BaseException:
            self._restore(active)
            raise
        active = sorted([*active, *self._sharded.active])
        self.last_info = info[active]
        if not bool(self.last_info[:, 0].any()):
            self._guard.after_step([self.factors[i] for i in active], self.last_info[:, RESIDUAL].tolist())
            self._guard.settle(self._sharded.factors)
            return
        self._restore([i for i in active if i not in self._sharded.active])
        refuse_moves({self.factors[i].name: int(info[i, 0]) for i in active}, self._settings.method)

    def _retract(self, group: list[int]) -> Tensor:
        moved, previous = [self._memory.views[i] for i in group], [self._memory.snapshot(i) for i in group]
        settings = self._settings
        return retract_moved(moved, previous, [self._divisors[i] for i in group], settings.retraction, settings.method)

    def _restore(self, active: list[int]) -> None:
        """Give every factor its value before the step, wherever it lies now."""
        self._memory.restore(active)
        self._sharded.restore()
        if self._quotient is not None:
            self._quotient.restore()
        self._guard.settle([self.factors[i] for i in active] + self._sharded.factors)

    def _finish_interrupted_step(self) -> None:
        """The optimizer raised in the last step, before the second hook: what it had moved by then is retracted."""
        if self._active is None:
            return
        active, self._active = self._active, None
        self._postponed.end()
        self._sharded.restore()
        self._guard.settle(self._sharded.factors)
        self._memory.follow(active)
        touched = [i for i in active if not self._guard.untouched(self.factors[i])]
        moved = [i for i in touched if self._guard.off_manifold(self.factors[i])]  # else somebody has put it right
        if self._quotient is not None or not all(bool(self._memory.views[i].isfinite().all()) for i in moved):
            self._restore(active)
        elif moved:
            self._retract_moved(moved)
            warnings.warn(
                f"optimizer.step(): the last one raised, or its hooks did, after it had moved "
                f"{', '.join(self.factors[i].name for i in moved)}, which stayed off their manifolds until now and are "
                "retracted. Gradients of this step were taken where they had been; zero them and compute them again to "
                "be exact, and call stella_kernels.optim.retract(model) before a model is evaluated or saved after "
                "such an error.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _products(self) -> tuple[Product, ...]:
        return self._quotient.products if self._quotient is not None else ()


def _alive(references: Sequence[weakref.ref[Optimizer]]) -> list[Optimizer]:
    return [one for reference in references if (one := reference()) is not None]


def _when_copied(reference: weakref.ref[Optimizer]) -> tuple[Callable[..., Any], Any]:
    """The attachments of which an optimizer is the outermost; the others come with that one."""
    one = reference()
    own = [a for a in attachments_of(one) if a._alive()[0] is one] if one is not None else []
    own = sorted(own, key=lambda a: a._number)
    return _attach_copy, [(a.factors, a._settings, a._products(), a._roster.family) for a in own]


def _attach_copy(optimizer: Optimizer, attachments: list[tuple[Any, Settings, Any, Family]]) -> None:
    """The geometry of the optimizer that ``optimizer`` is a copy of, on the copies of its factors."""
    for factors, settings, products, family in attachments:
        Attachment(wrappers.hooked_optimizers(optimizer), family, factors, settings, products)

"""What ``attach`` does around each step of an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import NonFiniteError
from ..nn import StiefelFactor
from ..operators.status import DRIFT, INFO_COLUMNS, RESIDUAL, STATUS_NON_FINITE, STATUS_OK, STATUS_OVERFLOW
from ..reference import stiefel
from . import targets, wrappers
from .guard import Guard
from .interruption import Postponed
from .memory import Memory
from .quotient import Product, QuotientStep
from .roster import Family, Roster

# Which attachments an optimizer has; weak on both sides, so that neither is kept alive.
_attachments: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Attachment]] = weakref.WeakKeyDictionary()


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
        self._divisors: list[float] = []
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
            wrappers.copies_through(optimizers[0], self._when_copied)

    def remove(self) -> None:
        """Take the hooks off the optimizer; the factors keep their values. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
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
            divisor = stiefel.gradient_scaling_divisor(factor.view.shape[0], self._settings.hidden_size)
            self._divisors.append(divisor)
        self._memory.add(factors)
        self._guard.watch(factors)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if wrappers.steps_under_way(self._alive()) > 1:
            return None  # inside another step, which is the one
        self._finish_interrupted_step()
        self._unevaluated = False
        targets.check_no_weight_decay(optimizer, self._constrained)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return None  # a fused optimizer under GradScaler, which is about to skip this step by itself
        self._guard.before_step(every=self._quotient is not None)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._begin(optimizer)
            self._postponed.begin()
            return None
        self._unevaluated = True
        self._postponed.begin()
        evaluate = self._evaluated_here(optimizer, closure)
        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def _evaluated_here(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, after which the gradients are made Riemannian; only at the point where the step began."""

        def evaluate() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._postponed.end()
                raise
            with torch.no_grad():
                if not all(map(self._guard.untouched, self.factors)):
                    if self._active is not None:
                        self._restore(self._active)
                        self._guard.settle(self.factors)
                        self._active = None
                    raise RuntimeError(
                        "closure: it was evaluated a second time within one step, where a constrained factor had moved "
                        "already, wanted one evaluation before anything moves: gradients at different points of the "
                        "manifold cannot be combined. Optimizers that search along a line, such as LBFGS, cannot be "
                        "attached; the constrained factors were put back, other parameters may have moved."
                    )
                self._unevaluated = False
                self._begin(optimizer)
            return loss

        return evaluate

    def _begin(self, optimizer: Optimizer) -> None:
        """Checks and rewrites the gradients, and keeps the factors as they are."""
        moving, held = [], 0
        for parameters in [group["params"] for group in optimizer.param_groups]:
            for parameter in parameters:
                if id(parameter) in self._constrained:
                    held += 1
                elif parameter.grad is not None:
                    moving.append(parameter)
        self._roster.check_held(self.factors, held)
        if new := self._roster.newcomers(moving):
            self._admit(optimizer, new)
        active = [i for i, f in enumerate(self.factors) if f.parameter.grad is not None]
        self._roster.check_moving(self.factors, len(active))
        self._memory.follow(active)
        gradients = {i: self._gradient(self.factors[i]) for i in active}
        targets.check_finite_cores([self.factors[i] for i in active], self.factors)
        groups = self._memory.groups(active)
        attached = attachments_of(optimizer)
        # one call writes nothing when it finds a NaN; several have to be checked beforehand
        if len(groups) > 1 or len(attached) > 1 or self._quotient is not None:
            for attachment in attached:
                attachment._refuse_non_finite_gradients()
        drift = torch.zeros(len(self.factors), dtype=torch.float64, device="cpu")
        if self._quotient is not None:
            self._quotient.make_riemannian(gradients, self._memory.views)
        for group in groups if self._quotient is None else ():
            info = torch.ops.stella_kernels.riemannian_gradient_(
                [gradients[i] for i in group],
                [self._memory.views[i] for i in group],
                [self._memory.snapshot(i) for i in group],
            ).cpu()
            if bool(info[:, 0].any()):
                self._refuse_gradients(group, info[:, 0].tolist())
            drift[group] = info[:, DRIFT]
        for group in groups if self._quotient is not None else ():
            torch._foreach_copy_([self._memory.snapshot(i) for i in group], [self._memory.views[i] for i in group])
        self._judge_drift(active, drift)
        self._drift = drift
        self._active = active

    def _admit(self, optimizer: Optimizer, new: Sequence[StiefelFactor]) -> None:
        """Factors that the optimizer is about to move for the first time: unfrozen, or added since."""
        if self._quotient is not None:
            raise ValueError(
                f"optimizer: {', '.join(f.name for f in new)} began to train after attach, which geometry='quotient' "
                "cannot take up; remove() the attachment and attach again."
            )
        elsewhere = {i for a in attachments_of(optimizer) if a is not self for i in a._constrained}
        new = [f for f in new if id(f.parameter) not in elsewhere]
        targets.check_shapes(new)
        targets.check_no_weight_decay(optimizer, {id(f.parameter): f.name for f in new})
        targets.check_orthonormal(new)
        self._constrain(new)

    def _judge_drift(self, active: list[int], drift: Tensor) -> None:
        """What the kernels saw, which no version counter shows: a write to ``.data``."""
        state = "No parameter was moved by this step; its gradients were rewritten, so zero them"
        factors = [self.factors[i] for i in active]
        before = [f.parameter._version for f in factors]
        self._guard.judge(factors, drift[active].tolist(), state)
        for i, factor, version in zip(active, factors, before, strict=True):
            if factor.parameter._version != version:  # retracted
                self._memory.snapshot(i).copy_(self._memory.views[i])
        self._guard.settle(factors)

    def _refuse_gradients(self, group: list[int], status: list[float]) -> None:
        large = [self.factors[i].name for i, s in zip(group, status, strict=True) if s == STATUS_OVERFLOW]
        if large:
            raise NonFiniteError(
                f"the gradient of {', '.join(large)} is finite and so large that the Riemannian gradient overflows; "
                "nothing was changed. Zero the gradients and look at the loss of this batch, or clip them first.",
                large,
            )
        self._refuse_non_finite([i for i, s in zip(group, status, strict=True) if s != STATUS_OK])

    def _gradient(self, factor: StiefelFactor) -> Tensor:
        gradient = targets.check_gradient(factor.name, factor.parameter)
        return gradient.mT if factor.transposed else gradient  # (n, r)

    def _refuse_non_finite_gradients(self) -> None:
        gradients = [f.parameter.grad for f in self.factors]
        self._refuse_non_finite([i for i, g in enumerate(gradients) if g is not None and not bool(g.isfinite().all())])

    def _refuse_non_finite(self, indices: list[int]) -> None:
        if not indices:
            return
        names = [self.factors[i].name for i in indices]
        values = [self.factors[i].name for i in indices if not bool(self._memory.views[i].isfinite().all())]
        what = f"the value of {', '.join(values)}" if values else f"the gradient of {', '.join(names)}"
        raise NonFiniteError(
            f"{what} holds NaN or an infinity, found before the optimizer moved anything. Zero the gradients and look "
            "at the loss of this batch (with float16, step through a GradScaler, which skips such batches).",
            names,
        )

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if wrappers.steps_under_way(self._alive()) > 1:
            return
        try:
            if self._unevaluated:
                self._unevaluated = False
                self._guard.before_step()  # it moved nothing, or says so
            elif self._active is not None:
                active, self._active = self._active, None
                self._retract_moved(active)
        finally:
            self._postponed.end()

    def _retract_moved(self, active: list[int]) -> None:
        self._memory.follow(active)
        info = torch.zeros(len(self.factors), INFO_COLUMNS, dtype=torch.float64, device="cpu")
        try:
            if self._quotient is not None:
                before = {i: self._memory.snapshot(i) for i in active}
                info[active] = self._quotient.retract(before, self._memory.views, self._divisors)
            for group in self._memory.groups(active) if self._quotient is None else ():
                info[group] = self._retract(group).to(info.device)
        except BaseException:
            self._restore(active)
            raise
        if self._quotient is None:
            info[:, DRIFT] = self._drift
        self.last_info = info[active]
        if not bool(self.last_info[:, 0].any()):
            self._guard.after_step([self.factors[i] for i in active], self.last_info[:, RESIDUAL].tolist())
            return
        self._restore(active)
        self._raise_for({i: int(info[i, 0]) for i in active})

    def _raise_for(self, status: dict[int, int]) -> None:
        back = (
            "All factors were put back to their values before this step; the other parameters and the optimizer's "
            "state have taken it, so go on from a checkpoint"
        )
        names = [self.factors[i].name for i, s in status.items() if s in (STATUS_NON_FINITE, STATUS_OVERFLOW)]
        if names:
            raise NonFiniteError(
                f"optimizer.step() moved {', '.join(names)} to NaN or an infinity, or so far that its retraction "
                f"overflows. {back}, with a lower learning rate.",
                names,
            )
        names = [self.factors[i].name for i, s in status.items() if s != STATUS_OK]
        raise RuntimeError(
            f"the polar retraction with method={self._settings.method!r} did not converge for {', '.join(names)}. "
            f"{back}, with method='auto' or 'svd'."
        )

    def _retract(self, group: list[int]) -> Tensor:
        """Steps 3 to 5 of the published step, in place; one row of info for each factor."""
        moved, previous = [self._memory.views[i] for i in group], [self._memory.snapshot(i) for i in group]
        divisors = [self._divisors[i] for i in group]
        if self._settings.retraction == "polar":
            return torch.ops.stella_kernels.project_retract_(moved, previous, divisors, self._settings.method)
        rows: list[list[float]] = []
        for new, old, divisor in zip(moved, previous, divisors, strict=True):
            if not bool(new.isfinite().all()):
                rows.append([STATUS_NON_FINITE, float("nan"), 0.0, float("nan"), 0.0])
                continue
            wide = torch.float32 if new.dtype in targets.HALF_DTYPES else new.dtype
            with torch.autocast(new.device.type, enabled=False):
                Q = stiefel.project_retract(old.to(wide), new.to(wide), divisor, self._settings.retraction)  # (n, r)
                new.copy_(Q)
                residual = float(stiefel.orthonormality_error(new.to(wide)))
            status = STATUS_OK if residual < float("inf") else STATUS_NON_FINITE
            rows.append([status, residual, 0.0, float("nan"), 0.0])
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    def _restore(self, active: list[int]) -> None:
        """Give every factor its value before the step, wherever it lies now."""
        self._memory.restore(active)
        if self._quotient is not None:
            self._quotient.restore()
        self._guard.settle([self.factors[i] for i in active])

    def _finish_interrupted_step(self) -> None:
        """The optimizer raised in the last step, before the second hook: what it had moved by then is retracted."""
        if self._active is None:
            return
        active, self._active = self._active, None
        self._postponed.end()
        self._memory.follow(active)
        touched = [i for i in active if not self._guard.untouched(self.factors[i])]
        moved = [i for i in touched if self._guard.off_manifold(self.factors[i])]  # else somebody has put it right
        if self._quotient is not None or not all(bool(self._memory.views[i].isfinite().all()) for i in moved):
            self._restore(active)
        elif moved:
            self._retract_moved(moved)

    def _when_copied(self) -> tuple[Callable[..., Any], Any]:
        one = self._alive()[0]
        return _attach_copy, [(a.factors, a._settings, a._products(), a._roster.family) for a in attachments_of(one)]

    def _products(self) -> tuple[Product, ...]:
        return self._quotient.products if self._quotient is not None else ()


def _alive(references: Sequence[weakref.ref[Optimizer]]) -> list[Optimizer]:
    return [one for reference in references if (one := reference()) is not None]


def _attach_copy(optimizer: Optimizer, attachments: list[tuple[Any, Settings, Any]]) -> None:
    """The geometry of the optimizer that ``optimizer`` is a copy of, on the copies of its factors."""
    for factors, settings, products, family in attachments:
        Attachment(wrappers.hooked_optimizers(optimizer), family, factors, settings, products)

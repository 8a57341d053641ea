"""AdamW for models with StelLA adapters: the whole Riemannian step of all constrained factors in one operator call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..checks import OffManifoldError
from ..distributed.adamw import ShardedAdamW, ShardedSlot
from ..distributed.rows import is_sharded
from ..nn import StiefelFactor
from ..operators.status import DRIFT, RESIDUAL, STATUS_OK, STATUS_OVERFLOW
from . import targets
from .fused.coupling import Couplings
from .fused.plan import Plan, Settled, Slot, groups_of, step_free
from .fused.refusals import (
    SkippedStep,
    check_free,
    check_state_dict,
    reasons_to_skip,
    refuse_gradients,
    refuse_large,
    refuse_options,
    refuse_retraction,
    refuse_stuck,
)
from .guard import Guard
from .interruption import uninterrupted
from .roster import Family, Roster


class StellaAdamW(AdamW):
    """AdamW that keeps the factors of StelLA adapters on their Stiefel manifolds (arXiv 2510.01938), fused.

    The same steps as ``torch.optim.AdamW`` with ``optim.attach`` (retraction 'polar'), up to round-off: for each
    constrained factor Y (n, r) with gradient ∇, moments of ``g = ∇ − Y ∇ᵀ Y``, AdamW's move with bias correction
    divided by ``sqrt(n / d)``, projected to the tangent space and retracted, all factors in one operator call per
    device and dtype. ``.grad`` is left as it is. All other parameters (S, biases, ...) take torch's own decoupled
    AdamW. No memory beyond AdamW's state; ``state_dict`` is interchangeable with that of ``torch.optim.AdamW`` over
    the same groups, in both directions. Factors of the model that begin to train later (unfrozen, added to a group)
    are constrained from then on.

    Args:
        params: a model: its trainable constrained factors form one group, without weight decay, and its other trainable
            parameters a second one; or parameters or groups as for any torch optimizer, constrained factors in groups
            with ``weight_decay=0``. Factors are float32 or float64; bfloat16 and float16 work at their own precision.
        lr: as in ``torch.optim.AdamW``, also by group, as all that follow; may be a tensor.
        betas: as there.
        eps: as there.
        weight_decay: as there, of the other parameters.
        amsgrad: False; see ``retraction``.
        factors: those to constrain: a model with StelLA adapters, or a sequence of ``StiefelFactor`` or tall parameters
            (n, r), n > r. Default: ``params``, where that is a model.
        grad_scaling: True takes d from the model's ``config.hidden_size``, a number is d itself, False is no scaling.
        retraction: 'polar'. For others, and for amsgrad, ``optim.attach`` serves any torch optimizer.
        coupled: take ``∇ᵀY`` from the gradient of S where the adapter can promise it (``optim.fused.coupling``), which
            saves a pass over the factors. ``coupled_reason`` says for which factors it cannot, and why.
        on_foreign_move: what to do with a factor that something else has moved off its manifold since its last step,
            found as a step begins (``optim.guard``): 'error', or 'retract' to go on from its orthogonal polar factor,
            for training that averages or interpolates weights (each step then measures every factor beforehand).
        skip_nonfinite: where any gradient holds NaN or infinity, or that of a factor is so large that its square
            overflows, the whole step is left out, moments and step counts too, and counted in ``skipped``, instead of
            the error below. Not where a value is at fault: every later step would be left out.
        maximize: as in ``torch.optim.AdamW``.
        foreach: as there, of the other parameters.
        fused: as there, of the other parameters.

    Attributes:
        factors: the constrained factors, in order.
        last_info: of the last step, (k, 5) float64 on the CPU, a row for each factor that had a gradient: status,
            ``‖QᵀQ − I‖`` (an upper bound), iterations, path, and the distance from the manifold as the step began. None
            before the first step.
        skipped: of the steps that were left out, how many each factor was the cause of, by name ('S beside' a factor
            for its S, 'param_groups[i]' for other parameters).
        coupled_reason: with ``coupled``, by name, why a factor is not coupled.

    Raises:
        TypeError, ValueError: a wrong argument; a factor that is wide, not orthonormal, not in ``params`` or in a group
            with weight decay; ``coupled`` where no factor can be.
        NonFiniteError: a factor holds NaN or an infinity.

    ``step(closure=None)`` raises, with nothing changed, ``ValueError`` for options that are not supported and for
    factors that are in no group any more, that the model has replaced, or that alone train and are in no optimizer,
    ``RuntimeError`` for a sparse gradient or where no factor has one in three steps,
    ``OffManifoldError`` for a factor that something else moved, ``NonFiniteError`` naming the factors whose gradient,
    or whose S's gradient, holds NaN or infinity, or is so large that its square overflows. A write to ``.data`` leaves
    no trace but the distance itself, which is known when the step is taken: the ``OffManifoldError`` then comes after
    the whole step. A factor whose value or moments hold NaN or infinity is named by a ``NonFiniteError`` as well and
    not moved, but by then the other factors are.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        factors: nn.Module | Iterable[StiefelFactor | nn.Parameter] | None = None,
        grad_scaling: bool | float = True,
        retraction: str = "polar",
        coupled: bool = False,
        on_foreign_move: str = "error",
        skip_nonfinite: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        refuse_retraction(retraction)
        refuse_options({"amsgrad": amsgrad})
        model = params if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList) else None
        if factors is None and model is None:
            raise ValueError(
                "factors: found None, wanted the model with StelLA adapters or a sequence of factors, so that it is "
                "known which of params are constrained; or give the model itself as params."
            )
        target: Any = model if factors is None else factors
        found = targets.resolve_factors(target)
        targets.check_shapes(found)
        targets.check_masters(found)
        self._hidden_size: float | None = None
        if grad_scaling is True:
            self._hidden_size = targets.hidden_size_of(target if model is None else model)
        elif grad_scaling is not False:
            self._hidden_size = targets.check_hidden_size("grad_scaling", grad_scaling)
        groups: Any = params if model is None else groups_of(model, found)
        super().__init__(groups, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach, fused=fused)
        self._step_supports_amp_scaling = False  # GradScaler unscales before the step, also where fused
        targets.check_held(self, found)
        targets.check_admissible(self, found)
        self.skip_nonfinite = skip_nonfinite
        self.skipped: Counter[str] = Counter()
        self.last_info: Tensor | None = None
        self._coupled = coupled
        self._roster = Roster(Family(target), self)
        self._guard = Guard((), on_foreign_move)
        self._constrain(found)
        if self._couplings is not None and len(self._couplings.reasons) == len(found):
            raise ValueError(
                f"coupled: no factor can take its Riemannian gradient from S: {found[0].name}, for example, cannot "
                f"because {self._couplings.reasons[found[0].name]}. Use coupled=False."
            )

    @property
    def factors(self) -> tuple[StiefelFactor, ...]:
        """The constrained factors, in order."""
        return self._factors

    @property
    def hidden_size(self) -> float | None:
        """The width d that moves are scaled with, None without scaling."""
        return self._hidden_size

    @property
    def coupled_reason(self) -> dict[str, str]:
        """With ``coupled``, why each factor that is not coupled is not, by name."""
        return {} if self._couplings is None else dict(self._couplings.reasons)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a factor of the model that was given, trainable only since then, is constrained as well.

        Raises:
            ValueError: a constrained factor in a group with weight decay, among others; the group is not added.
        """
        super().add_param_group(param_group)
        if "_slots" not in self.__dict__:
            return  # in the constructor, which checks all groups at its end
        try:
            self._admit(self._roster.newcomers(p for p in self.param_groups[-1]["params"] if p.requires_grad))
        except BaseException:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; that of ``torch.optim.AdamW`` over the same groups serves as well.

        Raises:
            ValueError: an option that StellaAdamW does not have, amsgrad for example, or the state of another
                optimizer; nothing is changed.
        """
        check_state_dict(state_dict)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_hidden_size", "_coupled", "skip_nonfinite", "skipped", "last_info")
        kept = {name: getattr(self, name) for name in own}
        told = {"_factors": self._factors, "_policy": self._guard.policy, "_family": self._roster.family}
        return {**super().__getstate__(), **kept, **told}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        factors, policy, family = (state.pop(key, None) for key in ("_factors", "_policy", "_family"))
        super().__setstate__(state)
        if factors is not None:  # unpickled or copied, rather than loaded
            self._step_supports_amp_scaling = False
            self._roster = Roster(family, self)
            self._guard = Guard((), policy)
            self._constrain(factors)

    def _admit(self, new: Sequence[StiefelFactor]) -> None:
        """Factors of the model that began to train after this optimizer was built."""
        if new:
            targets.check_admissible(self, new)
            self._constrain([*self._factors, *new])

    def _constrain(self, factors: Sequence[StiefelFactor]) -> None:
        self._guard.watch([f for f in factors if not self._guard.watches(f)])
        self._roster.constrain(factors)
        self._factors = tuple(factors)
        everyone = [(i, f, is_sharded(f.parameter)) for i, f in enumerate(factors)]
        self._slots = [Slot(i, f, self._hidden_size) for i, f, sharded in everyone if not sharded]
        self._sharded = ShardedAdamW([ShardedSlot(i, f, self._hidden_size) for i, f, sharded in everyone if sharded])
        slots: list[Slot | ShardedSlot] = [*self._slots, *self._sharded.slots]
        self._slot_of = {id(slot.parameter): slot for slot in slots}
        self._plan: Plan | None = None
        self._settled: Settled | None = None
        held = {id(p) for group in self.param_groups for p in group["params"]}
        if self._coupled and self._sharded.slots:
            raise ValueError("coupled: found True and sharded factors, whose S is sharded as well, wanted False.")
        self._couplings = Couplings(factors, held) if self._coupled else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients that the parameters hold, or that ``closure`` computes; returns its value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with uninterrupted():
            self._take_step()
        return loss

    def _take_step(self) -> None:
        free, new = self._free_parameters()
        if new:
            self._admit(new)
            free, _ = self._free_parameters()
        active = [slot for slot in self._slots if slot.parameter.grad is not None]
        moving = [slot for slot in self._sharded.slots if slot.parameter.grad is not None]
        self._roster.check_moving(self._factors, len(active) + len(moving))
        # a write to .data can be brought back before the step only where every factor is measured
        self._guard.before_step(self._guard.policy == "retract", self._roster.family.members)
        whole = [[p for p in parameters if not is_sharded(p)] for parameters in free] if self._sharded.slots else free
        causes = self._begin_sharded(free) if moving else []
        if self.skip_nonfinite:
            if causes := reasons_to_skip(self._slots, active, whole) + causes:
                targets.refuse_values(self._factors, "Nothing was changed by this step")
                self.skipped.update(causes)
                return
        else:
            refuse_gradients(self._factors, causes)
            targets.check_finite_cores([slot.factor for slot in active], self._factors)
        try:
            refuse_large(self._guard, [slot.factor for slot in self._sharded.large], self.skip_nonfinite)
            moved_elsewhere = self._step_factors(active, whole) if active else None
        except SkippedStep as left_out:
            self.skipped.update(left_out.args[0])
            return
        if moving:
            self._finish_sharded(active)
        for group, parameters in zip(self.param_groups, free, strict=True):
            if parameters:
                step_free(self, group, parameters)
        if moved_elsewhere is not None:
            raise moved_elsewhere

    def _begin_sharded(self, free: list[list[Tensor]]) -> list[str]:
        """The sums of sharded factors, of which nothing is written yet; names of gradients that are not finite."""
        watched = [p for parameters in free for p in parameters]
        causes = self._sharded.begin(watched, self.state)
        if self._guard.judge(self._sharded.factors, self._sharded.drifts, "Nothing was changed by this step"):
            causes = self._sharded.begin(watched, self.state)  # from where they were brought back to
        return causes

    def _finish_sharded(self, active: list[Slot]) -> None:
        moving = self._sharded.active
        info = self._sharded.finish(self.state, self.param_groups)
        places = torch.tensor([*(s.index for s in moving), *(s.index for s in active)], device="cpu")
        parts = [info, self.last_info] if active and self.last_info is not None else [info]
        self.last_info = torch.cat(parts)[places.argsort()]
        good = [found[0] == STATUS_OK for found in info.tolist()]
        factors = [slot.factor for slot, ok in zip(moving, good, strict=True) if ok]
        self._guard.after_step(factors, info[good][:, RESIDUAL].tolist())
        self._guard.settle(factors)
        if len(factors) < len(moving):
            refuse_stuck(self._guard, [slot.factor for slot, ok in zip(moving, good, strict=True) if not ok])

    def _free_parameters(self) -> tuple[list[list[Tensor]], list[StiefelFactor]]:
        """The unconstrained parameters of each group that have a gradient, and factors of the model among them.

        Refuses what the step cannot do.
        """
        free: list[list[Tensor]] = []
        held = 0
        for index, group in enumerate(self.param_groups):
            refuse_options(group)
            if group["foreach"] and isinstance(group["lr"], Tensor):
                raise ValueError(f"param_groups[{index}]: found foreach=True and lr as a tensor, which torch refuses.")
            rest: list[Tensor] = []
            before = held
            for p in group["params"]:
                slot = self._slot_of.get(id(p))
                if slot is not None:
                    slot.group = index
                    held += 1
                elif p.grad is not None:
                    if p.grad.layout is not torch.strided:
                        raise RuntimeError(
                            f"param_groups[{index}]: found a gradient of layout {p.grad.layout}, wanted dense ones."
                        )
                    rest.append(p)
            if held > before and group["weight_decay"]:
                targets.check_no_weight_decay(self, {i: slot.factor.name for i, slot in self._slot_of.items()})
            free.append(rest)
        if successors := self._roster.successors(self._factors, held):
            targets.check_admissible(self, successors)
            self._guard = Guard((), self._guard.policy)
            self._constrain(successors)
            return self._free_parameters()
        self._roster.check_held(self._factors, held)
        return free, self._roster.newcomers(p for rest in free for p in rest)

    def _step_factors(self, active: list[Slot], free: list[list[Tensor]]) -> OffManifoldError | None:
        """The error to raise when the step is over, where a factor had been moved by something else."""
        states = [*map(self.state.get, [slot.parameter for slot in active])]
        tensors = self._settled
        if tensors is None or not tensors.holds(active, states):
            for slot, state in zip(active, states, strict=True):
                if slot.follow(state):
                    self._plan = None
            tensors = self._settled = Settled(active)
        check_free(self, free)
        plan = self._planned(active)
        gradients = plan.gradients()
        known: dict[int, Tensor] = {}
        if self._couplings is not None:
            by_index = {slot.index: g for slot, g in zip(active, gradients, strict=True)}
            known = self._couplings.of_step({slot.index: slot.view for slot in active}, by_index)
        rates = [float(group["lr"]) for group in self.param_groups]
        if len(plan.calls) > 1:
            # one call writes nothing when it refuses a gradient; several have to be checked beforehand
            bad = [slot.factor.name for slot, g in zip(active, gradients, strict=True) if not bool(g.isfinite().all())]
            refuse_gradients(self._factors, bad)
            refuse_large(self._guard, [slot.factor for slot in plan.overflows(gradients, known)], self.skip_nonfinite)
        return self._finish(active, tensors, plan.run(tensors, gradients, known, rates))

    def _planned(self, active: list[Slot]) -> Plan:
        """The operator calls for these factors, with all hyperparameters in place but the learning rates and steps."""
        constants = [
            (float(g["betas"][0]), float(g["betas"][1]), float(g["eps"]), -1.0 if g["maximize"] else 1.0)
            for g in self.param_groups
        ]
        groups = [slot.group for slot in active]
        plan = self._plan
        if plan is None or plan.active != active or plan.groups != groups or plan.constants != constants:
            plan = self._plan = Plan(active, groups, constants)
        return plan

    def _finish(self, active: list[Slot], tensors: Settled, info: Tensor) -> OffManifoldError | None:
        """Book the factors that have taken the step; raise for the others."""
        status = info[:, 0].tolist()
        done, stuck = active, []
        if any(status):
            done = [slot for slot, s in zip(active, status, strict=True) if s == STATUS_OK]
            stuck = [slot for slot, s in zip(active, status, strict=True) if s != STATUS_OK]
            refuse_gradients(self._factors, [s.factor.name for s in stuck if not bool(s.gradient().isfinite().all())])
            large = [slot.factor for slot, s in zip(active, status, strict=True) if s == STATUS_OVERFLOW]
            refuse_large(self._guard, large, self.skip_nonfinite)
        for slot in done:
            if slot.fresh:  # kept only now, so that a step that raises leaves no state behind
                self.state[slot.parameter] = slot.state
                slot.fresh = False
        if not stuck:
            tensors.counters.add_(1)
        for slot in done if stuck else ():
            slot.step.add_(1)
        self.last_info = info
        if stuck:
            refuse_stuck(self._guard, [slot.factor for slot in stuck])
        return self._judge(active, info)

    def _judge(self, active: list[Slot], info: Tensor) -> OffManifoldError | None:
        factors = [slot.factor for slot in active]
        found = None
        try:
            state = "The step was taken in full from where they were found, and every factor is orthonormal again"
            self._guard.judge(factors, info[:, DRIFT].tolist(), state)
        except OffManifoldError as error:
            found = error
        self._guard.after_step(factors, info[:, RESIDUAL].tolist())
        return found

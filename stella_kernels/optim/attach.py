"""Turns any torch optimizer into a Riemannian one: hooks before and after its step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import METHODS, NonFiniteError, check_choice
from ..nn import StiefelFactor
from ..operators.status import INFO_COLUMNS, STATUS_NON_FINITE, STATUS_OK
from ..reference import stiefel
from . import targets
from .adamw import StellaAdamW
from .quotient import Product, QuotientStep, find_products

GEOMETRIES = ("stiefel", "euclidean", "quotient")

# Which attachments an optimizer has; weak on both sides, so that neither is kept alive.
_attachments: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Attachment]] = weakref.WeakKeyDictionary()


def attach(
    optimizer: Optimizer,
    target: nn.Module | Iterable[StiefelFactor | nn.Parameter],
    *,
    retraction: str = "polar",
    grad_scaling: bool | float = True,
    geometry: str = "stiefel",
    method: str = "auto",
) -> Attachment:
    """Keep factors on the Stiefel manifold while ``optimizer`` trains them: the StelLA step (arXiv 2510.01938).

    From now on each ``optimizer.step()``, for each factor Y (n, r) that has a gradient ∇:
    turns it into the Riemannian ``∇ − Y ∇ᵀ Y`` before the optimizer sees it, and afterwards takes the optimizer's
    move, divided by ``sqrt(n / d)`` and projected to the tangent space at Y, as the step to retract.
    The rewritten ``.grad`` stays until it is zeroed. The optimizer's ``state_dict`` is unaffected; hooks are not saved
    with it, so attach again after loading.

    Args:
        optimizer: any torch optimizer whose ``step`` takes no closure. Constrained factors go in groups without
            weight decay.
        target: a model with StelLA adapters (all its trainable factors are taken), or a sequence of ``StiefelFactor``
            or of tall parameters (n, r), n > r. float32 or float64; bfloat16 and float16 work at their own precision.
            Any devices.
        retraction: 'polar' (a native kernel), 'qr', 'exp_map' or 'cayley' (plain PyTorch; the last two keep the drift
            of a factor instead of correcting it).
        grad_scaling: True takes d from the model's ``config.hidden_size``, a number is d itself, False is no scaling.
        geometry: 'stiefel'; or, for the paper's ablations, 'euclidean' without constraint, which leaves the optimizer
            as it is, or 'quotient': U, S and V of a module move together, horizontally to the fibres on which U S Vᵀ is
            constant, in R3MC's metric (see ``optim.quotient``; in plain PyTorch, S full and held by the optimizer).
            The paper used no gradient scaling with either.
        method: of the polar factor, 'auto', 'newton_schulz' or 'svd'.

    Raises:
        TypeError: an argument of the wrong type, or a factor whose dtype is not floating.
        ValueError: a choice that does not exist, a wide or batched factor, a factor that is not orthonormal, is not in
            the optimizer, has weight decay or is attached already, an unknown hidden size.
        NonFiniteError: a factor holds NaN or an infinity.

    ``optimizer.step()`` then raises, with nothing changed, ``ValueError`` for weight decay set since and
    ``RuntimeError`` for a closure or a sparse or expanded gradient, ``NonFiniteError`` for a NaN or infinite gradient.
    If the optimizer moves a factor to NaN, or a retraction fails, all factors go back to their values before the step
    and ``NonFiniteError`` or ``RuntimeError`` names those at fault.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: found {type(optimizer).__name__}, wanted a torch.optim.Optimizer.")
    # Wrappers such as accelerate's hand step() over: the hooks belong on the optimizer that takes it.
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    check_choice("retraction", retraction, tuple(stiefel.RETRACTIONS))
    check_choice("geometry", geometry, GEOMETRIES)
    check_choice("method", method, METHODS)
    factors = targets.resolve_factors(target)
    hidden_size: float | None = None
    if grad_scaling is True:
        hidden_size = targets.hidden_size_of(target) if geometry != "euclidean" else None
    elif grad_scaling is not False:
        hidden_size = targets.check_hidden_size("grad_scaling", grad_scaling)
    targets.check_shapes(factors)
    products = find_products(factors) if geometry == "quotient" else []
    targets.check_held(optimizer, [*factors, *(StiefelFactor(p.core, False, p.core_name) for p in products)])
    attached = {id(f.parameter) for a in _attachments.get(optimizer, ()) for f in a.factors}
    twice = [f.name for f in factors if id(f.parameter) in attached]
    if twice:
        raise ValueError(
            f"target: {', '.join(twice)} already attached to this optimizer, which would retract twice a step; "
            "call .remove() on the first attachment before attaching again."
        )
    if isinstance(optimizer, StellaAdamW):
        own = {id(f.parameter) for f in optimizer.factors}
        twice = [f.name for f in factors if id(f.parameter) in own]
        if twice:
            raise ValueError(
                f"target: {', '.join(twice)} already constrained by this StellaAdamW, which retracts by itself; use it "
                "without attach, or attach to a torch.optim.AdamW."
            )
    if geometry != "euclidean":
        targets.check_orthonormal(factors)
        targets.check_no_weight_decay(optimizer, {id(f.parameter): f.name for f in factors})
    return Attachment(optimizer, factors, retraction, hidden_size, geometry, method, products)


def _inside_another_step(optimizer: Optimizer) -> bool:
    """Whether this hook was fired by ``super().step()`` within a step of the same optimizer.

    torch fires the hooks for both calls, and only the outer one is the step. The call stack is asked, since a count
    kept here would be wrong for ever after an optimizer that raised.
    """
    steps = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer":
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


class Attachment:
    """What ``attach`` did to an optimizer, until ``remove()``.

    Attributes:
        factors: the factors that were found, in order.
        last_info: of the last step, (k, 5) float64 on the CPU, a row for each factor that had a gradient: status,
            ``‖QᵀQ − I‖``, iterations, path (NaN where the retraction is not 'polar') and drift, as in
            ``operators/status.py``. None before the first step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factors: Sequence[StiefelFactor],
        retraction: str,
        hidden_size: float | None,
        geometry: str,
        method: str,
        products: Sequence[Product] = (),
    ) -> None:
        self.factors = tuple(factors)
        self.last_info: Tensor | None = None
        self._retraction = retraction
        self._method = method
        self._names = {id(f.parameter): f.name for f in factors}
        self._views = [f.view for f in factors]  # (n, r) each, the parameters' own memory
        self._snapshot: list[Tensor | None] = [None] * len(factors)  # as _views, reused by every step
        self._divisors = [stiefel.gradient_scaling_divisor(v.shape[0], hidden_size) for v in self._views]
        self._grouped: tuple[list[int], list[list[int]]] = ([], [])  # the factors last grouped, and their groups
        self._active: list[int] | None = None  # the factors of the step under way, between the two hooks
        self._quotient = QuotientStep(products, retraction, method) if geometry == "quotient" else None
        self._optimizer = weakref.ref(optimizer)
        self._hooks = []
        if geometry != "euclidean":
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        _attachments.setdefault(optimizer, weakref.WeakSet()).add(self)

    def remove(self) -> None:
        """Take the hooks off the optimizer; the factors keep their values. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._active = None
        self._snapshot = [None] * len(self.factors)
        optimizer = self._optimizer()
        if optimizer is not None and optimizer in _attachments:
            _attachments[optimizer].discard(self)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _inside_another_step(optimizer):
            return
        self._active = None  # of a step that the optimizer did not finish
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is not None:
            raise RuntimeError(
                "closure: found one in optimizer.step(closure), wanted none: it would compute gradients after the hook "
                "that makes them Riemannian. Call it yourself, `loss = closure()`, then optimizer.step(); optimizers "
                "that need one, such as LBFGS, cannot be attached."
            )
        targets.check_no_weight_decay(optimizer, self._names)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return  # a fused optimizer under GradScaler, which is about to skip this step by itself
        self._follow_parameters()
        active = [i for i, f in enumerate(self.factors) if f.parameter.grad is not None]
        gradients = {i: self._gradient(self.factors[i]) for i in active}
        groups = self._groups(active)
        attached = _attachments[optimizer]
        # one call writes nothing when it finds a NaN; several have to be checked beforehand
        if len(groups) > 1 or len(attached) > 1 or self._quotient is not None:
            for attachment in attached:
                attachment._refuse_non_finite_gradients()
        if self._quotient is not None:
            self._quotient.make_riemannian(gradients, self._views)
        for group in groups if self._quotient is None else ():
            info = torch.ops.stella_kernels.riemannian_gradient_(
                [gradients[i] for i in group], [self._views[i] for i in group], [self._buffer(i) for i in group]
            )
            if bool(info[:, 0].any()):
                self._refuse_non_finite([i for i, row in zip(group, info, strict=True) if row[0] != STATUS_OK])
        for group in groups if self._quotient is not None else ():
            torch._foreach_copy_([self._buffer(i) for i in group], [self._views[i] for i in group])
        self._active = active

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active is None or _inside_another_step(optimizer):
            return
        active, self._active = self._active, None
        self._follow_parameters()
        info = torch.zeros(len(self.factors), INFO_COLUMNS, dtype=torch.float64, device="cpu")
        try:
            if self._quotient is not None:
                before = {i: self._buffer(i) for i in active}
                info[active] = self._quotient.retract(before, self._views, self._divisors)
            for group in self._groups(active) if self._quotient is None else ():
                info[group] = self._retract(group).to(info.device)
        except BaseException:
            self._restore(active)
            raise
        self.last_info = info[active]
        if not bool(self.last_info[:, 0].any()):
            return
        status = {i: int(info[i, 0]) for i in active}
        self._restore(active)
        back = (
            "All factors were put back to their values before this step; the other parameters and the optimizer's "
            "state have taken it, so go on from a checkpoint"
        )
        names = [self.factors[i].name for i in active if status[i] == STATUS_NON_FINITE]
        if names:
            raise NonFiniteError(
                f"optimizer.step() moved {', '.join(names)} to NaN or an infinity. {back}, with a lower learning rate.",
                names,
            )
        names = [self.factors[i].name for i in active if status[i] != STATUS_OK]
        raise RuntimeError(
            f"the polar retraction with method={self._method!r} did not converge for {', '.join(names)}. "
            f"{back}, with method='auto' or 'svd'."
        )

    def _follow_parameters(self) -> None:
        """Renew the views of parameters that were given other memory, by ``model.to(...)`` for example."""
        for i, (factor, view) in enumerate(zip(self.factors, self._views, strict=True)):
            if view.data_ptr() != factor.parameter.data_ptr():
                self._views[i] = factor.view
                self._snapshot[i] = None
                self._grouped = ([], [])

    def _gradient(self, factor: StiefelFactor) -> Tensor:
        gradient = factor.parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"{factor.name}: found a gradient of layout {gradient.layout}, wanted a dense one; compute the "
                "factor's gradient without sparse=True."
            )
        if not gradient.is_contiguous() and any(
            step == 0 and size > 1 for size, step in zip(gradient.shape, gradient.stride(), strict=True)
        ):
            raise RuntimeError(
                f"{factor.name}: found a gradient of strides {gradient.stride()}, whose elements share memory, wanted "
                "one that can be rewritten in place; set p.grad = gradient.contiguous()."
            )
        gradient = gradient.detach()
        return gradient.mT if factor.transposed else gradient  # (n, r)

    def _groups(self, active: list[int]) -> list[list[int]]:
        """The factors that one operator call can take: same device, same dtype. Remembered from step to step."""
        if self._grouped[0] == active:
            return self._grouped[1]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in active:
            view = self._views[i]
            groups.setdefault((view.device, view.dtype), []).append(i)
        self._grouped = (active, list(groups.values()))
        return self._grouped[1]

    def _buffer(self, index: int) -> Tensor:
        """Where a factor's value before the step is kept: of the same strides, allocated once."""
        buffer = self._snapshot[index]
        if buffer is None:
            buffer = self._snapshot[index] = torch.empty_like(self._views[index])
        return buffer

    def _restore(self, active: list[int]) -> None:
        for i in active:
            self._views[i].copy_(self._buffer(i))
        if self._quotient is not None:
            self._quotient.restore()

    def _refuse_non_finite_gradients(self) -> None:
        gradients = [f.parameter.grad for f in self.factors]
        self._refuse_non_finite([i for i, g in enumerate(gradients) if g is not None and not bool(g.isfinite().all())])

    def _refuse_non_finite(self, indices: list[int]) -> None:
        if not indices:
            return
        names = [self.factors[i].name for i in indices]
        values = [self.factors[i].name for i in indices if not bool(self._views[i].isfinite().all())]
        what = f"the value of {', '.join(values)}" if values else f"the gradient of {', '.join(names)}"
        raise NonFiniteError(
            f"{what} holds NaN or an infinity, found before the optimizer moved anything. Zero the gradients and look "
            "at the loss of this batch (with float16, step through a GradScaler, which skips such batches).",
            names,
        )

    def _retract(self, group: list[int]) -> Tensor:
        """Steps 3 to 5 of the published step, in place; one row of info for each factor."""
        moved, previous = [self._views[i] for i in group], [self._buffer(i) for i in group]
        divisors = [self._divisors[i] for i in group]
        if self._retraction == "polar":
            return torch.ops.stella_kernels.project_retract_(moved, previous, divisors, self._method)
        rows: list[list[float]] = []
        for new, old, divisor in zip(moved, previous, divisors, strict=True):
            if not bool(new.isfinite().all()):
                rows.append([STATUS_NON_FINITE, float("nan"), 0.0, float("nan"), float("nan")])
                continue
            wide = torch.float32 if new.dtype in targets.HALF_DTYPES else new.dtype
            Q = stiefel.project_retract(old.to(wide), new.to(wide), divisor, self._retraction)  # (n, r)
            residual = float(stiefel.orthonormality_error(Q))
            status = STATUS_OK if residual < float("inf") else STATUS_NON_FINITE
            drift = float(stiefel.orthonormality_error(old.double()))
            rows.append([status, residual, 0.0, float("nan"), drift])
            new.copy_(Q)
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

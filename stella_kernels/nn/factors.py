"""Which parameters of a model are Stiefel factors, and what an optimizer must know of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class StiefelFactor:
    """One trainable parameter whose (n, r) view is kept on the Stiefel manifold, its columns orthonormal.

    Attributes:
        parameter: the parameter, (n, r), or (r, n) where ``transposed``.
        transposed: whether the parameter is stored as the transpose of the tall factor (Vᵀ is).
        name: the parameter's name in its model; error messages carry it.
        core: the S that this factor multiplies in ``U S Vᵀ``, where the module says; None where it does not.
        side: 'left' for U, 'right' for V; None without a core.
        master: the dtype that its module promised to keep it in; None where there is no promise. See ``lost_masters``.
    """

    parameter: nn.Parameter
    transposed: bool
    name: str
    core: nn.Parameter | None = None
    side: str | None = None
    master: torch.dtype | None = None

    @property
    def view(self) -> Tensor:
        """The factor as (n, r), n >= r: detached, sharing the parameter's memory."""
        value = self.parameter.detach()
        return value.mT if self.transposed else value


# (name within its module, parameter, transposed), of an adapter U S Vᵀ also S and 'left' or 'right', then the dtype
# that the module promises to keep the factor in
OwnFactor = (
    tuple[str, nn.Parameter, bool]
    | tuple[str, nn.Parameter, bool, nn.Parameter, str]
    | tuple[str, nn.Parameter, bool, nn.Parameter, str, torch.dtype]
)


@runtime_checkable
class HasStiefelFactors(Protocol):
    """A module that owns constrained factors."""

    def own_stiefel_factors(self) -> Iterator[OwnFactor]:
        """Yield (name within this module, parameter, transposed) of each factor that is trained.

        Where it is the U or the V of ``x V Sᵀ Uᵀ`` and nothing else, S and 'left' (U) or 'right' (V) may follow, and
        after them the dtype that the module promises to keep it in.

        A module may have a second method, ``every_stiefel_factor()``, that yields those too that are not trained now.
        """
        ...


def stiefel_factors(model: nn.Module, frozen: bool = False) -> list[StiefelFactor]:
    """The trainable constrained factors of ``model`` and of every module in it, named as in ``named_parameters``.

    A module takes part by having a method ``own_stiefel_factors()`` that yields (local name, parameter, transposed).
    A parameter shared by several modules is listed once, under the first name, and without a core if they use it with
    different ones. Devices and dtypes are left as they are.

    Args:
        model: the model.
        frozen: list those too that are not trained now: frozen ones, and those of adapters that are not active.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, wanted a torch.nn.Module.")
    found: dict[int, StiefelFactor] = {}
    for prefix, module in model.named_modules():
        if not _owns(module):
            continue
        for own in _every(module) if frozen else module.own_stiefel_factors():
            local_name, parameter, transposed = own[:3]
            name = f"{prefix}.{local_name}" if prefix else local_name
            factor = StiefelFactor(parameter, transposed, name, *own[3:])
            first = found.setdefault(id(parameter), factor)
            if first.core is not factor.core or first.side != factor.side:
                found[id(parameter)] = replace(first, core=None, side=None)
    return list(found.values())


def _owns(module: nn.Module) -> TypeGuard[HasStiefelFactors]:
    # not of what a wrapper passes on, which owns nothing; isinstance of the protocol asks that, at 50 us a module
    return "own_stiefel_factors" in vars(module) or hasattr(type(module), "own_stiefel_factors")


def _every(module: HasStiefelFactors) -> list[OwnFactor]:
    every = getattr(module, "every_stiefel_factor", None)
    if every is not None:
        return list(every())
    assert isinstance(module, nn.Module)
    still = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for p in still:
            p.requires_grad_(True)  # the one method that such a module has lists what is trained
        return list(module.own_stiefel_factors())
    finally:
        for p in still:
            p.requires_grad_(False)


def missing_factors_advice(model: nn.Module) -> str:
    """What to do about a model in which ``stiefel_factors`` finds none: they are frozen, or there are no adapters."""
    owners = [name for name, module in model.named_modules() if _owns(module)]
    if not owners:
        return "add adapters first (StellaLinear, or get_peft_model with a StellaConfig)"
    return (
        f"it has {len(owners)} adapted layers (the first is {owners[0]!r}) and none is trained: load the adapter with "
        "PeftModel.from_pretrained(..., is_trainable=True), make it the active one with model.set_adapter(name), or "
        "unfreeze U and Vt with requires_grad_(True)"
    )


def tolerance_of(n: int, r: int, dtype: torch.dtype) -> float:
    """The ``‖QᵀQ − I‖`` in Frobenius norm that an (n, r) matrix with orthonormal columns may have in ``dtype``.

    Rounding Q to its dtype with relative error eps/2 moves QᵀQ by at most ``2 (eps/2) ‖Q‖₂ ‖Q‖ = eps sqrt(r)``. The
    arithmetic that made it, float32 for the half dtypes, leaves each of the r columns off by some sqrt(n) eps.
    Both are allowed several times over: the check is for factors that were never orthonormal.
    """
    eps = torch.finfo(dtype).eps
    arithmetic = min(eps, torch.finfo(torch.float32).eps)
    return 2 * eps * math.sqrt(r) + 8 * arithmetic * math.sqrt(n * r)


def orthonormality_tolerance(factor: StiefelFactor) -> float:
    """The ``‖QᵀQ − I‖`` in Frobenius norm that an orthonormal factor of this shape and dtype may have."""
    n, r = factor.view.shape
    return tolerance_of(n, r, factor.parameter.dtype)

"""Modules with StelLA factors, how factors are initialised, and how an optimizer finds the constrained ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class StiefelFactor:
    """One trainable parameter whose (n, r) view is kept on the Stiefel manifold, its columns orthonormal.

    Attributes:
        parameter: the parameter, (n, r), or (r, n) where ``transposed``.
        transposed: whether the parameter is stored as the transpose of the tall factor (Vᵀ is).
        name: the parameter's name in its model; error messages carry it.
    """

    parameter: nn.Parameter
    transposed: bool
    name: str

    @property
    def view(self) -> Tensor:
        """The factor as (n, r), n >= r: detached, sharing the parameter's memory."""
        value = self.parameter.detach()
        return value.mT if self.transposed else value


@runtime_checkable
class HasStiefelFactors(Protocol):
    """A module that owns constrained factors."""

    def own_stiefel_factors(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield (name within this module, parameter, transposed) of each factor that is trained."""
        ...


def stiefel_factors(model: nn.Module) -> list[StiefelFactor]:
    """The trainable constrained factors of ``model`` and of every module in it, named as in ``named_parameters``.

    A module takes part by having a method ``own_stiefel_factors()`` that yields (local name, parameter, transposed).
    A parameter shared by several modules is listed once, under the first name. Devices and dtypes are left as they are.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, wanted a torch.nn.Module.")
    found: dict[int, StiefelFactor] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, HasStiefelFactors):
            continue
        for local_name, parameter, transposed in module.own_stiefel_factors():
            name = f"{prefix}.{local_name}" if prefix else local_name
            found.setdefault(id(parameter), StiefelFactor(parameter, transposed, name))
    return list(found.values())

"""Factors are full-precision masters: what keeps them so, finds those that are not, and mends them.

In bfloat16 a factor is 2e-4 off its manifold from the start, and most updates round to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..reference.stiefel import orthonormality_error
from .factors import StiefelFactor, stiefel_factors, tolerance_of


def _narrower(dtype: torch.dtype, wanted: torch.dtype) -> bool:
    return not dtype.is_floating_point or torch.finfo(dtype).eps > torch.finfo(wanted).eps


def master_after_apply(
    parameter: Tensor, before: torch.dtype, master: torch.dtype, fn: Callable[[Tensor], Tensor]
) -> torch.dtype:
    """The dtype that a module promises its factors after ``Module._apply(fn)``, which found them in ``before``.

    ``model.to(dtype)`` and its kin are a choice, and change the promise. A cast of ``parameter.data`` passes by here
    and is none.
    """
    if parameter.dtype != before:
        return parameter.dtype
    if _narrower(parameter.dtype, master):  # cast by .data before: does fn ask for that very dtype?
        return fn(torch.empty(0, dtype=master, device=parameter.device)).dtype
    return master


def lost_masters(factors: Iterable[StiefelFactor]) -> list[str]:
    """The names of the factors that are in a narrower dtype than the one their module made them with and promised.

    ``model.to(torch.bfloat16)``, or a dtype given when the factors were made, is a choice and not listed; a cast of
    ``parameter.data``, which TRL does to the trainable parameters of a quantized model, is.
    """
    return [f.name for f in factors if f.master is not None and _narrower(f.parameter.dtype, f.master)]


@torch.no_grad()
def restore_masters(target: nn.Module | Iterable[StiefelFactor]) -> list[str]:
    """Cast the factors that ``lost_masters`` names, and their S, back in place, and put U and V back on the manifold.

    What rounding took away stays lost: call it before training, right after whatever cast them. An optimizer made
    before holds the same parameters.

    Args:
        target: a model with StelLA adapters, or factors.

    Returns:
        The names of the factors that were cast.
    """
    factors = stiefel_factors(target) if isinstance(target, nn.Module) else list(target)
    lost = set(lost_masters(factors))
    for factor in factors:
        if factor.name not in lost or factor.master is None:
            continue
        side = "rows" if factor.transposed else "columns"
        _replace(factor.parameter, in_full_precision(factor.parameter.detach(), factor.master, side))
        if factor.core is not None and _narrower(factor.core.dtype, factor.master):
            _replace(factor.core, factor.core.detach().to(factor.master))
    return [factor.name for factor in factors if factor.name in lost]


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    parameter.data = value
    parameter.grad = None if gradient is None else gradient.to(value.dtype)


@torch.no_grad()
def in_full_precision(stored: Tensor, dtype: torch.dtype, orthonormal: str | None) -> Tensor:
    """A factor that was stored in another dtype: in ``dtype``, and back on the manifold that it was rounded off.

    Args:
        stored: U (m, r), Vᵀ (r, n) or S, in any floating-point dtype.
        orthonormal: 'columns' (U), 'rows' (Vᵀ), or None (S).
    """
    full = stored.to(dtype)
    if orthonormal is None or stored.is_meta or not _narrower(stored.dtype, dtype):
        return full
    tall = full if orthonormal == "columns" else full.mT  # (n, r)
    # further off than rounding explains: it was never orthonormal, and is not touched
    if not float(orthonormality_error(tall)) <= tolerance_of(tall.shape[0], tall.shape[1], stored.dtype):
        return full
    Q = functional.polar(tall)
    assert isinstance(Q, Tensor)
    return (Q if orthonormal == "columns" else Q.mT).contiguous()


def _fault(key: str, stored: Tensor) -> str | None:
    if stored.dtype.is_floating_point:
        return None
    return (
        f"{key}: found dtype {stored.dtype}, wanted a floating-point tensor; dequantize the checkpoint, or take the "
        "real part, before loading it."
    )


def start_fits(state_dict: dict[str, Any], wanted: dict[str, Tensor], error_msgs: list[str]) -> bool:
    """Whether the U0 and Vt0 of ``state_dict`` can become the start of a layer that has none; faults are reported.

    Args:
        state_dict: what is loaded.
        wanted: U and Vt of the layer, by the keys of U0 and Vt0.
        error_msgs: of ``load_state_dict``.
    """
    faults = [fault for key in wanted if (fault := _fault(key, state_dict[key])) is not None]
    for key, factor in wanted.items():
        found, expected = tuple(state_dict[key].shape), tuple(factor.shape)
        if found != expected:
            faults.append(f"size mismatch for {key}: found shape {found} in the checkpoint, wanted {expected}.")
    error_msgs.extend(faults)
    return not faults


def check_stored(
    state_dict: dict[str, Any], key: str, parameter: Tensor, orthonormal: str | None, error_msgs: list[str]
) -> None:
    """Make the value of ``key`` fit to be loaded into ``parameter``: of its dtype, and on the manifold.

    One that is no floating-point tensor, which torch would convert in silence, is taken out of ``state_dict`` and
    reported in ``error_msgs``. A wrong shape is left for torch to report.
    """
    stored = state_dict.get(key)
    if not isinstance(stored, Tensor):
        return
    if (fault := _fault(key, stored)) is not None:
        del state_dict[key]
        error_msgs.append(fault)
    elif stored.shape == parameter.shape and stored.dtype != parameter.dtype:
        # loading by assignment (low_cpu_mem_usage) would take over the checkpoint's dtype
        state_dict[key] = in_full_precision(stored, parameter.dtype, orthonormal)

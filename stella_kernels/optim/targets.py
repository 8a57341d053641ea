"""What ``attach`` is given, checked: factors that are orthonormal and in the optimizer, the width of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import NonFiniteError, check_float_tensor
from ..distributed import measures
from ..distributed.rows import is_sharded, why_not
from ..nn import (
    StiefelFactor,
    lost_masters,
    missing_factors_advice,
    orthonormality_tolerance,
    stiefel_factors,
)
from ..operators.memory import has_memory, overlaps_itself
from ..reference import stiefel

HALF_DTYPES = (torch.bfloat16, torch.float16)


def resolve_factors(target: nn.Module | Iterable[StiefelFactor | nn.Parameter]) -> list[StiefelFactor]:
    """The factors that ``target`` names: those of a model, or a sequence of factors and tall parameters."""
    if isinstance(target, nn.Module) and not isinstance(target, nn.ParameterList):
        factors = stiefel_factors(target)
        if not factors:
            raise ValueError(
                f"target: {type(target).__name__} has no trainable Stiefel factors, wanted a model with StelLA "
                f"adapters; {missing_factors_advice(target)}, or pass the factors."
            )
        return factors
    if isinstance(target, Tensor | StiefelFactor) or not isinstance(target, Iterable):
        raise TypeError(
            f"target: found {type(target).__name__}, wanted a torch.nn.Module or a sequence of StiefelFactor or "
            "torch.nn.Parameter; put a single factor in a list."
        )
    factors = [_as_factor(index, item) for index, item in enumerate(target)]
    if not factors:
        raise ValueError("target: found an empty sequence, wanted at least one factor.")
    first: dict[int, int] = {}
    for index, factor in enumerate(factors):
        if first.setdefault(id(factor.parameter), index) != index:
            raise ValueError(
                f"target: item {index} ({factor.name}) is the same parameter as item {first[id(factor.parameter)]}; "
                "pass each factor once."
            )
    return factors


def _as_factor(index: int, item: StiefelFactor | nn.Parameter) -> StiefelFactor:
    name = f"target[{index}]"
    if isinstance(item, StiefelFactor):
        return replace(item, name=item.name or name)
    if not isinstance(item, nn.Parameter):
        raise TypeError(
            f"{name}: found {type(item).__name__}, wanted a StiefelFactor or a torch.nn.Parameter "
            "(an optimizer moves parameters; a plain tensor or a view of one cannot be attached)."
        )
    if item.dim() == 2 and item.shape[0] <= item.shape[1]:
        raise ValueError(
            f"{name}: found a parameter of shape {tuple(item.shape)}, wanted (n, r) with n > r: square and wide ones "
            "do not say which side is orthonormal. Pass StiefelFactor(parameter, transposed=..., name=...), with "
            "transposed=True where the rows are."
        )
    return StiefelFactor(item, False, name)


def check_shapes(factors: Sequence[StiefelFactor]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless every factor is a dense floating-point matrix, tall as viewed."""
    for factor in factors:
        if is_sharded(factor.parameter) and (reason := why_not(factor)):
            raise ValueError(f"{factor.name}: {reason}.")
        check_float_tensor(factor.name, factor.parameter)
        if factor.parameter.dim() != 2:
            raise ValueError(
                f"{factor.name}: found shape {tuple(factor.parameter.shape)}, wanted a matrix (n, r), or (r, n) stored "
                "transposed; pass each matrix of a batch as a parameter of its own."
            )
        n, r = factor.view.shape
        if n < r:
            raise ValueError(
                f"{factor.name}: found shape {tuple(factor.parameter.shape)} with transposed={factor.transposed}, so "
                f"n = {n} < r = {r}, wanted n >= r; pass StiefelFactor(..., transposed={not factor.transposed})."
            )
        if not is_sharded(factor.parameter) and not has_memory(factor.parameter):
            raise ValueError(
                f"{factor.name}: found a parameter whose storage was freed, wanted one in memory; bring back what was "
                "offloaded first."
            )
        if factor.parameter.is_meta or factor.parameter.layout is not torch.strided:
            raise ValueError(
                f"{factor.name}: found a {factor.parameter.layout} parameter on device {factor.parameter.device}, "
                "wanted a dense one that holds values; load the model's weights before attaching."
            )


def refuse_sharded(factors: Sequence[StiefelFactor], **options: tuple[str, str]) -> None:
    """Raise ``ValueError`` for options, each (found, wanted), that sharded factors do not have."""
    sharded = [f.name for f in factors if is_sharded(f.parameter)]
    for name, (found, wanted) in options.items():
        if sharded and found != wanted:
            raise ValueError(
                f"{name}: found {found!r} for the sharded {sharded[0]}, wanted {wanted!r}, which needs sums over "
                "processes only; leave the adapters whole (stella_kernels.distributed.shard_base) for others."
            )


def non_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Places of those that hold NaN or an infinity; few operations where none does.

    Raises ``RuntimeError`` for one whose storage was freed.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if not has_memory(tensor):
            raise RuntimeError(
                f"optimizer.step(): found a gradient or a value of {tuple(tensor.shape)} whose storage was freed or "
                f"shrunk to {tensor.untyped_storage().nbytes()} bytes, "
                "wanted it in memory; bring back what was offloaded before the step."
            )
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    found: list[int] = []
    for places in kinds.values():
        joined = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        if not bool(joined.isfinite().all()):
            found += [i for i in places if not bool(tensors[i].isfinite().all())]
    return sorted(found)


def peaks(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude of each, NaN of what holds one; the device is waited for once, not for each."""
    found = [torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, value in enumerate(found):
        kinds.setdefault((value.device, value.dtype), []).append(i)
    largest = [0.0] * len(found)
    for places in kinds.values():
        for i, value in zip(places, torch.stack([found[i] for i in places]).tolist(), strict=True):
            largest[i] = value
    return largest


def tall_gradient(factor: StiefelFactor) -> Tensor:
    """The gradient of a factor as (n, r), once it is known that it can be rewritten in place."""
    gradient = check_gradient(factor.name, factor.parameter)
    return gradient.mT if factor.transposed else gradient


def refuse_values(factors: Sequence[StiefelFactor], state: str) -> None:
    """Raise ``NonFiniteError`` for factors, and S beside them, whose own value holds NaN or an infinity.

    Asked before a gradient is blamed: with such a value every gradient is NaN, whatever the batch.
    """
    values: dict[int, tuple[Tensor, str, str]] = {}
    for f in factors:
        if not is_sharded(f.parameter):  # else the sums of the step have said so
            values.setdefault(id(f.parameter), (f.parameter.detach(), f.name, f.name))
        if f.core is not None and not is_sharded(f.core):
            values.setdefault(id(f.core), (f.core.detach(), f"the S beside {f.name}", f.name))
    bad = [(what, name) for v, what, name in values.values() if has_memory(v) and not bool(v.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"the value of {', '.join(what for what, _ in bad)} holds NaN or an infinity, found as optimizer.step() "
            f"began, and no other batch helps. {state}; load a sound checkpoint.",
            [name for _, name in bad],
        )


def check_finite_cores(factors: Sequence[StiefelFactor], everyone: Sequence[StiefelFactor]) -> None:
    """Raise ``NonFiniteError`` for an S whose gradient holds NaN or an infinity, named by a factor beside it."""
    found = [(f.core, f.name) for f in reversed(factors) if f.core is not None and not is_sharded(f.core)]
    cores = {id(core): (core.grad, name) for core, name in found}  # the first factor's name
    gradients = [(g, name) for g, name in cores.values() if g is not None and g.layout is torch.strided]
    if bad := [gradients[i][1] for i in non_finite([gradient for gradient, _ in gradients])]:
        refuse_values(everyone, "Nothing was changed by this step")
        raise NonFiniteError(
            f"the gradient of the S beside {', '.join(bad)} holds NaN or an infinity, found before the optimizer moved "
            "anything. Zero the gradients and look at the loss of this batch.",
            bad,
        )


def check_masters(factors: Sequence[StiefelFactor]) -> None:
    """Raise ``ValueError`` for factors in a narrower dtype than the one their module promised to keep them in."""
    if lost := set(lost_masters(factors)):
        first = next(f for f in factors if f.name in lost)
        raise ValueError(
            f"{', '.join(f.name for f in factors if f.name in lost)}: found {first.parameter.dtype}, wanted "
            f"{first.master}, which they were made in: something cast the trainable parameters by .data, as TRL does "
            "for quantized models, and in half precision most updates round to nothing. Call "
            "stella_kernels.nn.restore_masters(model) after that cast and before training; model.to(dtype) is a "
            "choice and is respected."
        )


def check_orthonormal(factors: Sequence[StiefelFactor]) -> None:
    """Raise ``NonFiniteError`` or ``ValueError`` unless every factor is finite and has orthonormal columns."""
    sharded = [f for f in factors if is_sharded(f.parameter)]
    errors = measures.distances(sharded) if sharded else []
    factors = [f for f in factors if not is_sharded(f.parameter)]
    bad = [f.name for f in factors if not bool(f.view.isfinite().all())]
    bad += [f.name for f, error in zip(sharded, errors, strict=True) if not math.isfinite(error)]
    if bad:
        raise NonFiniteError(
            f"target: {', '.join(bad)} held NaN or an infinity at attach, wanted orthonormal columns; "
            "initialise them again, or load a sound checkpoint.",
            bad,
        )
    for factor in factors:
        view = factor.view.float() if factor.parameter.dtype in HALF_DTYPES else factor.view
        errors.append(float(stiefel.orthonormality_error(view)))
    for factor, error in zip([*sharded, *factors], errors, strict=True):
        view, tolerance = factor.view, orthonormality_tolerance(factor)
        if not error <= tolerance:
            raise ValueError(
                f"{factor.name}: found columns with ‖QᵀQ − I‖ = {error:.3g}, wanted at most {tolerance:.3g} for shape "
                f"{tuple(view.shape)} in {factor.parameter.dtype}. Initialise it with orthonormal columns, or replace "
                "it by its polar factor: `with torch.no_grad(): factor.view.copy_(stella_kernels.polar(factor.view))`."
            )


def check_admissible(optimizer: Optimizer, factors: Sequence[StiefelFactor]) -> None:
    """Raise for factors that an optimizer cannot constrain from now on: shapes, weight decay, values."""
    check_shapes(factors)
    check_no_weight_decay(optimizer, {id(f.parameter): f.name for f in factors})
    check_orthonormal(factors)


def check_gradient(name: str, parameter: Tensor) -> Tensor:
    """The gradient of ``parameter``, called ``name``, once it is known that it can be rewritten in place.

    Raises ``RuntimeError``, before anything changes, for none at all; a sparse layout; another dtype, device or shape
    than the parameter's; a negated or conjugate view; elements that share memory.
    """
    gradient = parameter.grad
    if gradient is None:
        raise RuntimeError(f"{name}: found no gradient, wanted one; call backward first, or leave the factor out.")
    found = ""
    if gradient.layout is not torch.strided:
        found = f"of layout {gradient.layout}, wanted a dense one; compute it without sparse=True"
    elif gradient.dtype != parameter.dtype or gradient.device != parameter.device:
        found = (
            f"of {gradient.dtype} on {gradient.device}, wanted {parameter.dtype} on {parameter.device}, as the factor "
            "is; convert it, with p.grad.to(p), before the step"
        )
    elif gradient.shape != parameter.shape:
        found = (
            f"of shape {tuple(gradient.shape)}, wanted {tuple(parameter.shape)}, the factor's; zero the gradients "
            "after replacing a parameter's data"
        )
    elif not has_memory(gradient):
        found = "whose storage was freed or shrunk, wanted one in memory; bring it back before the step"
    elif gradient.is_neg():
        found = "that is a negated view, wanted a plain one; set p.grad = gradient.resolve_neg()"
    elif gradient.is_conj():
        found = "that is a conjugate view, wanted a plain one; set p.grad = gradient.resolve_conj()"
    elif overlaps_itself(gradient):
        found = (
            f"of strides {gradient.stride()}, whose elements share memory, wanted one that can be rewritten in place; "
            "set p.grad = gradient.contiguous()"
        )
    if found:
        raise RuntimeError(f"{name}: found a gradient {found}.")
    return gradient


def check_held(optimizer: Optimizer, factors: Sequence[StiefelFactor]) -> None:
    """Raise ``ValueError`` naming the factors whose parameter is in no group of the optimizer."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [f.name for f in factors if id(f.parameter) not in held]
    if missing:
        raise ValueError(
            f"optimizer: it does not hold {', '.join(missing)}, so it would never move them. Build the optimizer from "
            "the parameters of the model that has its adapters (after get_peft_model), or leave these out of target. "
            "DeepSpeed's ZeRO 1 to 3 exchange them for flat buffers, where no factor can be told: take FSDP2, or "
            "stella_kernels.distributed.shard_base."
        )


def check_no_weight_decay(optimizer: Optimizer, names: dict[int, str]) -> None:
    """Raise ``ValueError`` if a group that holds a constrained parameter (id to name) has weight decay."""
    for index, group in enumerate(optimizer.param_groups):
        decay = group.get("weight_decay", 0)
        if not decay:  # 0, None or a tensor that holds 0
            continue
        decayed = [names[id(p)] for p in group["params"] if id(p) in names]
        if decayed:
            raise ValueError(
                f"optimizer: parameter group {index} has weight_decay={decay} and holds the constrained "
                f"{', '.join(decayed)}, wanted weight_decay=0: a factor on the Stiefel manifold cannot shrink. Put the "
                "constrained factors in a group of their own: AdamW([{'params': others}, {'params': "
                "[f.parameter for f in stiefel_factors(model)], 'weight_decay': 0.0}])."
            )


def hidden_size_of(target: object) -> float:
    """The width of the model's residual stream, read from its configuration."""
    config: Any = getattr(target, "config", None)
    candidates = [config]
    if hasattr(config, "get_text_config"):
        candidates.append(config.get_text_config())
    for candidate in candidates:
        size = candidate.get("hidden_size") if isinstance(candidate, dict) else getattr(candidate, "hidden_size", None)
        if isinstance(size, int | float) and not isinstance(size, bool):
            return check_hidden_size("config.hidden_size", size)
    raise ValueError(
        f"grad_scaling: True takes the model's hidden size, and {type(target).__name__} has no config.hidden_size. "
        "Pass grad_scaling=d with the width d of the model, or grad_scaling=False to leave the steps unscaled."
    )


def check_hidden_size(argument: str, value: object) -> float:
    """The value as a positive finite float, or ``ValueError``/``TypeError`` naming the argument."""
    if not isinstance(value, int | float):
        raise TypeError(f"{argument}: found {type(value).__name__}, wanted True, False or a positive number.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{argument}: found {value!r}, wanted True, False or a positive number (the model's width).")
    return float(value)

"""The phases of a step on some rows of each factor, by the reference: the schemas are ``signatures.PHASES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..reference import adamw, sharded
from ..reference.autocast import without_autocast
from . import signatures
from .status import (
    INFO_COLUMNS,
    LARGEST_NORM,
    PATH_FLOAT64_GRAM,
    STATUS_NOT_CONVERGED,
    STATUS_OK,
    arithmetic_dtype,
    grams_words,
    sums_words,
)


def split(flat: Tensor, factors: Sequence[Tensor], words: Callable[[int], int]) -> Iterator[Tensor]:
    """The part of each factor."""
    begin = 0
    for factor in factors:
        end = begin + words(factor.shape[-1])
        yield flat[begin:end]
        begin = end


def _flat(parts: list[Tensor], like: Sequence[Tensor]) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=arithmetic_dtype(like[0].dtype) if like else torch.float32)
    return torch.cat(parts)


def _blocks(flat: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return sharded.unpacked(flat, factor.shape[1])


def gradient_gram(a: signatures.GradientGram) -> Tensor:
    parts = []
    for gradient, factor in zip(a.gradients, a.factors, strict=True):
        wide = arithmetic_dtype(factor.dtype)
        blocks = sharded.gradient_blocks(factor.to(wide), gradient.to(wide))
        norm = torch.linalg.vector_norm(gradient.double())
        norm = torch.where(gradient.isfinite().all(), norm.clamp_max(LARGEST_NORM), math.nan)
        parts.append(sharded.packed(blocks, norm.to(wide).reshape(1)))
    return _flat(parts, a.factors)


def riemannian_gradient_rows_(a: signatures.RiemannianGradientRows) -> Tensor:
    for i, sums in enumerate(split(a.sums, a.factors, sums_words)):
        gradient, factor = a.gradients[i], a.factors[i]
        wide = arithmetic_dtype(factor.dtype)
        K, _ = _blocks(sums, factor)
        if a.snapshots:
            a.snapshots[i].copy_(factor)
        gradient.copy_(gradient.to(wide) - factor.to(wide) @ K)
    return a.sums.new_empty(0)


def retract_gram(a: signatures.RetractGram) -> Tensor:
    parts = []
    for moved, previous, divisor in zip(a.moved, a.previous, a.divisors, strict=True):
        Y = previous.to(arithmetic_dtype(previous.dtype))
        parts.append(sharded.packed(sharded.step_blocks(Y, (moved.to(Y.dtype) - Y) / divisor)))
    return _flat(parts, a.moved)


def retract_rows_(a: signatures.RetractRows) -> Tensor:
    rows = []
    given = zip(split(a.sums, a.moved, sums_words), split(a.grams, a.moved, grams_words), strict=True)
    for i, (sums, grams) in enumerate(given):
        Y = a.previous[i].to(arithmetic_dtype(a.previous[i].dtype))
        delta = (a.moved[i].to(Y.dtype) - Y) / a.divisors[i]
        rows.append(_retract(a.moved[i], Y, delta, sums, grams))
    return _info(rows)


def adamw_gram_(a: signatures.AdamWGram) -> tuple[Tensor, Tensor]:
    parts, steps = [], []
    for i, (sums, row) in enumerate(zip(split(a.sums, a.factors, sums_words), a.hyperparameters.tolist(), strict=True)):
        factor = a.factors[i]
        wide = arithmetic_dtype(factor.dtype)
        K, _ = _blocks(sums, factor)
        names = ("lr", "beta1", "beta2", "eps", "step", "divisor", "sign")
        delta, m, v = adamw.adamw_move(
            *(t.to(wide) for t in (factor, a.gradients[i], a.exp_avgs[i], a.exp_avg_sqs[i])),
            **dict(zip(names, row, strict=True)),
            coupling=K,
        )
        a.exp_avgs[i].copy_(m)
        a.exp_avg_sqs[i].copy_(v)
        parts.append(sharded.packed(sharded.step_blocks(factor.to(wide), delta)))
        steps.append(delta.reshape(-1))
    return _flat(parts, a.factors), _flat(steps, a.factors)


def adamw_rows_(a: signatures.AdamWRows) -> Tensor:
    rows, begin = [], 0
    if a.steps.numel() != (wanted := sum(factor.numel() for factor in a.factors)):
        raise RuntimeError(
            f"{a.name}: steps: found {a.steps.numel()} elements, wanted {wanted}, as adamw_gram_ gave them."
        )
    given = zip(split(a.sums, a.factors, sums_words), split(a.grams, a.factors, grams_words), strict=True)
    for factor, (sums, grams) in zip(a.factors, given, strict=True):
        Y = factor.to(arithmetic_dtype(factor.dtype))
        delta = a.steps[begin : begin + factor.numel()].reshape(factor.shape)
        begin += factor.numel()
        rows.append(_retract(factor, Y, delta, sums, grams))
    return _info(rows)


def _retract(into: Tensor, Y: Tensor, delta: Tensor, sums: Tensor, grams: Tensor) -> list[float]:
    """Put these rows of uf(Y + Δ') in place; a row of info, the same on every process."""
    r = Y.shape[1]
    if r == 0:
        return [STATUS_OK, 0.0, 0.0, PATH_FLOAT64_GRAM, 0.0]
    _, C = _blocks(sums, into)
    A, D = _blocks(grams, into)
    drift = float(torch.linalg.matrix_norm(C.double() - torch.eye(r, dtype=torch.float64, device=C.device)))
    solution = sharded.solve(C, A, D)
    # the round-off of the sums, relative to G's condition and to what cancelled in it (and ‖Y‖₂² ≤ 1 + drift), of the
    # product, and of its coefficients (csrc/cpu/stiefel/residual.h); more than G's least eigenvalue, and it has no root
    root, growth = math.sqrt(r), max(1.0, solution.growth) * math.sqrt(1.0 + drift)
    error = torch.finfo(Y.dtype).eps * root * (2 + 1.25 * root + 8 * solution.condition * growth)
    if not error <= 0.25:
        return [STATUS_NOT_CONVERGED, math.nan, 0.0, PATH_FLOAT64_GRAM, drift]
    left, right = solution.left.to(Y.dtype), solution.right.to(Y.dtype)
    into.copy_(Y + Y @ left + delta @ right)
    stored = 2.0 * torch.finfo(into.dtype).eps * math.sqrt(r)
    return [STATUS_OK, error + stored, 0.0, PATH_FLOAT64_GRAM, drift]


def _info(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, INFO_COLUMNS)


def _outside_autocast(implementation: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Every phase's first argument is a list of tensors, all on one device."""

    def serve(a: signatures.Signature) -> Any:
        tensors: list[Tensor] = getattr(a, fields(a)[0].name)  # type: ignore[arg-type]
        if not tensors:
            return implementation(a)
        with without_autocast(tensors[0].device):
            return implementation(a)

    return serve


IMPLEMENTATIONS: dict[type[signatures.Signature], Callable[[Any], Any]] = {
    signatures.GradientGram: _outside_autocast(gradient_gram),
    signatures.RiemannianGradientRows: _outside_autocast(riemannian_gradient_rows_),
    signatures.RetractGram: _outside_autocast(retract_gram),
    signatures.RetractRows: _outside_autocast(retract_rows_),
    signatures.AdamWGram: _outside_autocast(adamw_gram_),
    signatures.AdamWRows: _outside_autocast(adamw_rows_),
}

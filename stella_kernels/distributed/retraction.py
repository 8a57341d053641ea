"""From moved rows to orthonormal ones: the retraction's last phase, and another where one left more than round-off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..nn.factors import tolerance_of
from ..operators.status import DRIFT, INFO_COLUMNS, RESIDUAL, STATUS_OK, grams_words
from .reduction import Call, calls_of, summed
from .rows import Rows

_kernels = torch.ops.stella_kernels

_POLISHES = 2  # the first takes an error of 0.25 to some 1e-2 or less, the second to round-off


def info_of(calls: Sequence[Call], infos: Sequence[Tensor]) -> Tensor:
    """The rows of all calls in the order of the factors, on the CPU."""
    info = torch.empty(sum(len(call.rows) for call in calls), INFO_COLUMNS, dtype=torch.float64, device="cpu")
    for call, rows in zip(calls, infos, strict=True):
        info[call.places] = rows.cpu()
    return info


def polish(rows: Sequence[Rows], held: Sequence[Tensor], info: Tensor) -> Tensor:
    """Retract once more, where they lie, the factors that a long step left farther off than their dtype's round-off.

    Args:
        rows: the factors.
        held: their rows (n_i, r), as ``rows[i].of`` gave them; written.
        info: of the step so far.

    Returns info with the residuals that are left, the same on every process.
    """
    for _ in range(_POLISHES):
        far = [i for i, found in enumerate(info.tolist()) if found[0] == STATUS_OK and not _good(rows[i], found)]
        if not far:
            return info
        again = retract_held([rows[i] for i in far], [held[i] for i in far])
        again[:, DRIFT] = info[far, DRIFT]
        info[far] = again
    return info


def retract_held(rows: Sequence[Rows], held: Sequence[Tensor]) -> Tensor:
    """Replace ``held``, rows of each factor (n_i, r), by those of its orthogonal polar factor; info, a row for each."""
    calls = calls_of(rows)
    own = [call.chosen(held)[0] for call in calls]
    sums, _ = summed(calls, [_kernels.gradient_gram(tensors, tensors) for tensors in own])
    infos = []
    for call, tensors, flat in zip(calls, own, sums, strict=True):
        grams = flat.new_zeros(sum(grams_words(each.r) for each in call.rows))  # of no step
        infos.append(_kernels.retract_rows_(tensors, [t.clone() for t in tensors], [1.0] * len(tensors), flat, grams))
    return info_of(calls, infos)


def _good(rows: Rows, found: Sequence[float]) -> bool:
    residual = found[RESIDUAL]
    return math.isfinite(residual) and residual <= tolerance_of(rows.n, rows.r, rows.factor.parameter.dtype)

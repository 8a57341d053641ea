"""The operators of ``torch.ops.stella_kernels`` on Triton: arguments checked, what kernels do not take passed on.

``info`` is on the factors' device, so that nothing waits for it; of polar, which raises for data that is not finite, on
the CPU. The reference takes ranks above 128 and ``method='svd'``, which is torch's own on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...operators import arguments, fallback, signatures
from ...operators.status import INFO_COLUMNS, STATUS_NON_FINITE, STATUS_NOT_CONVERGED
from ..launch.configuration import MAX_RANK
from ..launch.device import runs_on
from . import launches


def _groups(factors: Sequence[Tensor]) -> list[list[int]]:
    """Places of the factors of each dtype and device, empty factors left out; one group wherever they are alike."""
    kinds: dict[object, list[int]] = {}
    for i, factor in enumerate(factors):
        if factor.numel():
            kinds.setdefault((factor.dtype, factor.device), []).append(i)
    return list(kinds.values())


def _takes(factors: Sequence[Tensor]) -> bool:
    """Whether the kernels have the ranks, and run on the GPUs."""
    return all(factor.shape[1] <= MAX_RANK and runs_on(factor.device) for factor in factors)


S = TypeVar("S", bound=signatures.Signature)


def _selected(a: S, at: list[int]) -> S:
    """The same call, of some of its factors: every list that has them."""
    values = {name: getattr(a, name) for name in a.arguments()}
    return type(a)(**{name: [v[i] for i in at] if isinstance(v, list) and v else v for name, v in values.items()})


def _of_groups(a: signatures.Signature, factors: Sequence[Tensor], call: Callable[[list[int]], Tensor]) -> Tensor:
    """Rows of ``info`` of all factors from those of each group; those of one group alone are not copied.

    Where the memory of one group lies is checked as its table of addresses is made, not at every step.
    """
    groups = _groups(factors)
    if len(groups) == 1 and len(groups[0]) == len(factors):
        return call(groups[0])
    arguments.check_memory(a)
    device = factors[0].device if factors else None
    info = torch.zeros(len(factors), INFO_COLUMNS, dtype=torch.float64, device=device)
    for group in groups:
        info[torch.tensor(group, device=device)] = call(group).to(info.device)
    return info


def riemannian_gradient_(a: signatures.RiemannianGradient) -> Tensor:
    arguments.check_values(a)
    # A gradient that is not finite stops them all, so that two kinds of factors cannot be two calls of the kernels.
    if not _takes(a.factors) or len(_groups(a.factors)) > 1:
        arguments.check_memory(a)
        return _on_device_of(a.factors, fallback.riemannian_gradient_(a))
    return _of_groups(a, a.factors, lambda at: launches.riemannian_gradient_(_selected(a, at)))


def project_retract_(a: signatures.ProjectRetract) -> Tensor:
    arguments.check_values(a)
    if a.method == "svd" or not _takes(a.moved):
        arguments.check_memory(a)
        return _on_device_of(a.moved, fallback.project_retract_(a))
    return _of_groups(a, a.moved, lambda at: launches.project_retract_(_selected(a, at)))


def stella_adamw_(a: signatures.StellaAdamWStep) -> Tensor:
    arguments.check_values(a)
    if not _takes(a.factors) or len(_groups(a.factors)) > 1:
        arguments.check_memory(a)
        return _on_device_of(a.factors, fallback.stella_adamw_(a))

    def call(at: list[int]) -> Tensor:
        some = _selected(a, at)
        if len(at) < len(a.factors):
            some = dataclasses.replace(some, hyperparameters=a.hyperparameters[at])
        return launches.stella_adamw_(some)

    return _of_groups(a, a.factors, call)


def polar(a: signatures.Polar) -> tuple[Tensor, Tensor]:
    """Waits for the device."""
    M, method = a.M, a.method
    arguments.check_values(a)
    n, r = M.shape[-2:]
    if method == "svd" or r > MAX_RANK or not M.numel() or not runs_on(M.device):
        return fallback.polar(a)
    batch = M.reshape(-1, n, r)
    Q, info = launches.polar_of(batch)
    info = info.cpu()
    if bool(info[:, 0].any()):
        _finish_polar(batch, Q, info, method)
    return Q.reshape(M.shape), info


def _finish_polar(batch: Tensor, Q: Tensor, info: Tensor, method: str) -> None:
    """Raise for what is not finite; what did not converge, rank deficient all of it, goes to the SVD."""
    bad = (info[:, 0] == STATUS_NON_FINITE).nonzero()
    if len(bad):
        raise RuntimeError(
            f"polar: matrix {int(bad[0])} of M holds NaN or an infinity; the orthogonal polar factor is not defined "
            "for it. Check the values that were passed in."
        )
    left = (info[:, 0] == STATUS_NOT_CONVERGED).nonzero().flatten()
    if method == "newton_schulz":
        raise RuntimeError(
            f"polar: matrix {int(left[0])} of M did not converge by Newton-Schulz: it is rank deficient to working "
            "precision. Use method='auto' or 'svd'."
        )
    factors, rows = fallback.polar(signatures.Polar(batch[left.to(batch.device)], "svd"))
    Q[left.to(Q.device)] = factors
    info[left] = rows


def _on_device_of(factors: Sequence[Tensor], info: Tensor) -> Tensor:
    return info.to(factors[0].device) if factors else info


IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "polar": polar,
    "riemannian_gradient_": riemannian_gradient_,
    "project_retract_": project_retract_,
    "stella_adamw_": stella_adamw_,
}

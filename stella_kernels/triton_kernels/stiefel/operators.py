"""The operators of ``torch.ops.stella_kernels`` on Triton: arguments checked, what kernels do not take passed on.

``info`` is on the factors' device, so that nothing waits for it; of polar, which raises for data that is not finite, on
the CPU. The reference takes ranks above 128 and ``method='svd'``, which is torch's own on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...operators import arguments, fallback, planned, signatures
from ...operators.status import INFO_COLUMNS, STATUS_NON_FINITE, STATUS_NOT_CONVERGED
from ..launch.configuration import MAX_RANK
from ..launch.device import runs_on
from ..launch.table import Identity, Table, identity_of, met_before, numbered, remember, table_of
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


def _columns(a: signatures.Signature) -> list[list[Tensor]]:
    """The lists of tensors of the factors' shapes, in the table's order."""
    lists = (getattr(a, name) for name, kind in a.arguments().items() if kind == "list[Tensor]" and name != "couplings")
    return [each for each in lists if each]


def _identity(a: signatures.Signature, couplings: Sequence[Tensor] = ()) -> Identity:
    try:
        return identity_of(_columns(a), couplings)
    except (RuntimeError, NotImplementedError):  # of what has no address or no strides
        arguments.check_values(a)
        raise


def _table(a: signatures.Signature, identity: Identity, steps: bool = False) -> Table | None:
    """The table of a call over factors of one dtype and device, its arguments checked; None where no kernel takes it.

    What does not depend on the tensors' values is asked once for the same memory, not at every step.
    """
    columns = _columns(a)
    if not columns or not _takes(columns[0]) or len(_groups(columns[0])) > 1 or not all(map(Tensor.numel, columns[0])):
        return None
    arguments.check_memory(a)
    return table_of(identity, columns, getattr(a, "couplings", None), steps)


def riemannian_gradient_(a: signatures.RiemannianGradient) -> Tensor:
    identity = _identity(a)
    table = met_before(identity)
    if table is None:
        arguments.check_values(a)
        table = _table(a, identity)
    # A gradient that is not finite stops them all, so that two kinds of factors cannot be two calls of the kernels.
    if table is None:
        arguments.check_memory(a)
        return _on_device_of(a.factors, fallback.riemannian_gradient_(a))
    return launches.riemannian_gradient_(a, table)


def stella_adamw_(a: signatures.StellaAdamWStep) -> Tensor:
    number = planned.number([*chain.from_iterable(_columns(a)), *a.couplings])
    if number and (table := numbered(number)) is not None:
        arguments.check_hyperparameters(a)
        return launches.stella_adamw_(a, table)
    identity = _identity(a, a.couplings)
    steps = bool(a.factors) and launches.keeps_steps(a.factors[0].dtype)
    table = met_before(identity, steps)
    if table is None:
        arguments.check_values(a)
        table = _table(a, identity, steps)
    else:
        arguments.check_hyperparameters(a)
    if table is None:
        arguments.check_memory(a)
        return _on_device_of(a.factors, fallback.stella_adamw_(a))
    if number:
        remember(number, identity, table)
    return launches.stella_adamw_(a, table)


def project_retract_(a: signatures.ProjectRetract) -> Tensor:
    identity = _identity(a)
    table = None if a.method == "svd" else met_before(identity)
    if table is None:
        arguments.check_values(a)
        table = None if a.method == "svd" else _table(a, identity)
    else:
        arguments.check_divisors(a)
    if table is not None:
        return launches.project_retract_(a, table)
    arguments.check_memory(a)
    if a.method == "svd" or not _takes(a.moved):
        return _on_device_of(a.moved, fallback.project_retract_(a))
    device = a.moved[0].device if a.moved else None
    info = torch.zeros(len(a.moved), INFO_COLUMNS, dtype=torch.float64, device=device)
    for group in _groups(a.moved):
        info[torch.tensor(group, device=device)] = project_retract_(_selected(a, group)).to(info.device)
    return info


def _selected(a: S, at: list[int]) -> S:
    """The same call, of some of its factors: every list that has them."""
    values = {name: getattr(a, name) for name in a.arguments()}
    return type(a)(**{name: [v[i] for i in at] if isinstance(v, list) and v else v for name, v in values.items()})


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

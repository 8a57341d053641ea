"""The judgement of every backend against the float64 reference, over the one table of cases (case_table.py).

A case makes its data from its own seed, stores it as asked, poisons memory with NaN, runs one operator of one backend
and compares. ``python -m stella_kernels verify`` and the tests run the same table. A new backend is one more entry of
:func:`implementations`; a new operator is a runner in ``stiefel_runners.py`` or
``adapter_runners.py`` and its rows in the table.

Tolerances, with u the unit round-off of the storage dtype and w that of the arithmetic (float32 for half types):
storing the result costs u, whatever computes it. A stable algorithm commits a backward error of about w sqrt(r) of the
data's norm (sums of r products, round-offs of random sign: Higham and Mary 2019); a polar factor moves by at most
1/σ_min of that (2/(σ_i + σ_j): Higham, Functions of Matrices, 2008, theorem 8.9), hence the condition number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..operators import backends
from ..operators.fallback import REFERENCE
from ..operators.signatures import OPERATORS
from ..triton_kernels import registration
from . import adapter_runners, stiefel_runners
from .case_data import Implementation, Measures
from .case_table import Case
from .on_device import on


@dataclass(frozen=True)
class Result:
    """The worst measure of a case: ``what`` was compared, its error, and the tolerance it is held to."""

    case: Case
    backend: str
    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN does not pass

    @property
    def ratio(self) -> float:
        if self.error == 0.0:
            return 0.0
        return self.error / self.tolerance if self.tolerance and not math.isnan(self.error) else math.inf


def implementations() -> dict[str, Implementation]:
    """The backends that serve on this machine, best first, each with the operators it has."""
    found: dict[str, Implementation] = {}
    if backends.serving("polar") == "cpu":
        found["cpu"] = {name: getattr(torch.ops.stella_kernels, name) for name in OPERATORS}
    if backends.serving("polar", "cuda") == "triton":
        found["triton"] = {name: on("cuda", call) for name, call in registration.operators().items()}
    found["reference"] = dict(REFERENCE)
    return found


_RUNNERS: dict[str, Callable[[Case, Implementation], Measures]] = {
    "polar": stiefel_runners.polar,
    "riemannian_gradient_": stiefel_runners.gradient,
    "project_retract_": stiefel_runners.retract,
    "stella_adamw_": stiefel_runners.adamw_step,
    "adapter_forward_": adapter_runners.forward,
    "adapter_product": adapter_runners.product,
    "adapter_backward_": adapter_runners.backward,
    "philox_dropout": adapter_runners.dropout,
}


def measures(case: Case, implementation: Implementation) -> list[tuple[str, float, float]]:
    """Every comparison of a case: what, error, tolerance."""
    return list(_RUNNERS[case.operator](case, implementation))


def check(case: Case, backend: str, implementation: Implementation) -> Result:
    """The comparison nearest to, or furthest past, its tolerance; an exception of the operator is an infinite error."""
    try:
        results = [Result(case, backend, *measure) for measure in measures(case, implementation)]
    except (RuntimeError, ValueError, TypeError) as error:
        return Result(case, backend, f"raised {type(error).__name__}: {error}", math.inf, 0.0)
    missed = [result for result in results if not result.passed]
    return missed[0] if missed else max(results, key=lambda result: result.ratio)

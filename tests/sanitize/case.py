"""One call of one operator, with what it is given, what may be written, and what is asked of its results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stella_kernels.operators.status import INFO_COLUMNS
from tests.sanitize.layouts import Held

Complaints = list[str]  # what is wrong with a result; none where nothing is


@dataclass
class Call:
    """``arguments`` by name, tensors as :class:`Held`; ``judge`` takes what the operator returned.

    ``fault`` names what is wrong with the arguments: the operator has to raise and to leave everything as it was.
    ``may_raise`` is for arguments that have no answer, such as NaN.
    """

    operator: str
    arguments: dict[str, Any]
    judge: Callable[[Any], Complaints]
    threads: int = 1
    kind: str = "gaussian"
    fault: str = ""
    may_raise: bool = False
    shared: list[Held] = field(default_factory=list)  # memory that more than one argument sees

    def held(self) -> list[tuple[str, Held]]:
        found = []
        for name, value in self.arguments.items():
            each = value if isinstance(value, list) else [value]
            found += [(name, t) for t in each if isinstance(t, Held)]
        return found

    def passed(self) -> list[Any]:
        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(each) for each in value]
            return value.view if isinstance(value, Held) else value

        return [plain(value) for value in self.arguments.values()]

    def run(self) -> Complaints:
        torch.set_num_threads(self.threads)
        operator = getattr(torch.ops.stella_kernels, self.operator)
        try:
            results = operator(*self.passed())
        except RuntimeError as error:
            if self.fault or self.may_raise:
                changed = [name for name, held in self.held() if not held.unchanged()]
                return [f"{name}: written although the call was refused: {error}" for name in changed]
            return [f"raised {error}"]
        if self.fault:
            return ["was not refused"]
        complaints = [f"{name}: {what}" for name, held in self.held() if (what := held.touched())]
        return complaints + self.judge(results)

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, list):
                return "[" + ", ".join(map(shown, value)) + "]"
            if isinstance(value, Held):
                value = value.view
            if isinstance(value, Tensor):
                dtype = str(value.dtype).removeprefix("torch.")
                place = "" if value.device.type == "cpu" else f" {value.device}"
                return f"{tuple(value.shape)}/{value.stride()}+{value.storage_offset()} {dtype}{place}"
            return repr(value)

        given = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        what = f", fault: {self.fault}" if self.fault else ""
        return f"{self.operator}({given}) on {self.threads} threads, values {self.kind}{what}"


def round_offs(dtype: torch.dtype) -> tuple[float, float]:
    """Unit round-off of the storage and of the arithmetic."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps / 2, torch.finfo(arithmetic).eps / 2


def away(what: str, value: Tensor, exact: Tensor, tolerance: float, size: float | None = None) -> Complaints:
    """A complaint where ``value`` is further from ``exact``, in Frobenius norm relative to ``size``, than allowed."""
    if value.shape != exact.shape:
        return [f"{what}: shape {tuple(value.shape)}, wanted {tuple(exact.shape)}"]
    norm = float(torch.linalg.vector_norm(exact.double())) if size is None else size
    error = float(torch.linalg.vector_norm(value.double() - exact.double())) / max(norm, 1e-300)
    return [] if error <= tolerance or math.isclose(error, 0.0) else [f"{what}: off by {error:.2e} > {tolerance:.2e}"]


def not_orthonormal(what: str, Q: Tensor, tolerance: float) -> Complaints:
    """Of (n, r)."""
    r = Q.shape[-1]
    if not r:
        return []
    wide = Q.double()
    error = float(torch.linalg.matrix_norm(wide.mT @ wide - torch.eye(r, dtype=torch.float64))) / math.sqrt(r)
    return [] if error <= tolerance else [f"{what}: {error:.2e} from orthonormal, wanted {tolerance:.2e}"]


def wrong_info(info: Tensor, count: int) -> Complaints:
    if info.shape != (count, INFO_COLUMNS) or info.dtype != torch.float64:
        return [f"info: {tuple(info.shape)} {info.dtype}, wanted ({count}, {INFO_COLUMNS}) float64"]
    return [] if set(info[:, 0].tolist()) <= {0.0, 1.0, 2.0, 3.0} else [f"info: statuses {info[:, 0].tolist()}"]

"""The one table of cases that every backend is held to: which operator, on what data, stored how."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STORAGES = ("rows", "columns", "strided")
RANKS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 20, 31, 32, 33, 40, 64, 96, 128, 200, 256)


@dataclass(frozen=True)
class Case:
    """One call of one operator. ``shapes`` holds (..., n, r) for each matrix, or (T, m, n, r) for the adapter."""

    operator: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    storage: str = "rows"  # 'rows': (n, r) contiguous, 'columns': (r, n) contiguous, 'strided': gaps both ways
    scale: float = 1.0  # of the matrix, or the length of a column's step (project_retract_, stella_adamw_)
    divisor: float = 1.0
    method: str = "auto"
    dropout: float = 0.0
    diagonal: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        shape = "+".join("x".join(map(str, s)) for s in self.shapes[:3]) + ("+..." if len(self.shapes) > 3 else "")
        parts = [self.operator, self.kind, shape, str(self.dtype).removeprefix("torch."), self.storage]
        parts += [f"scale{self.scale:g}"] if self.scale != 1.0 else []
        parts += [f"divisor{self.divisor:g}"] if self.divisor != 1.0 else []
        parts += [self.method] if self.method != "auto" else []
        parts += [f"dropout{self.dropout:g}"] if self.dropout else []
        parts += ["diagonal"] if self.diagonal else []
        return "-".join(parts)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))


def _heights(r: int, index: int) -> int:
    """Tall sizes that are multiples of nothing, square ones among them."""
    return (r, r + 1, 2 * r + 3, 5 * r + 7, 613 + r)[index % 5]


def _dtypes(r: int) -> tuple[torch.dtype, ...]:
    """Large ranks cost the reference seconds each."""
    return DTYPES if r <= 33 else (torch.float32, torch.float64) if r == 64 else (torch.float32,)


def _polar_cases() -> list[Case]:
    table = []
    for index, r in enumerate(RANKS):
        for kind_of, dtype in enumerate(_dtypes(r)):
            n = _heights(r, index + kind_of + 1)
            storage = STORAGES[(index + kind_of) % 3]
            table.append(Case("polar", "gaussian", ((n, r),), dtype, storage, quick=r in (1, 7, 32)))
    for storage in STORAGES:
        table.append(Case("polar", "batch", ((2, 3, 37, 5),), torch.float32, storage, quick=True))
        table.append(Case("polar", "batch", ((5, 129, 16),), torch.float64, storage))
    for batch, n, r in ((5, 259, 4), (3, 1031, 8), (2, 515, 12), (2, 301, 48)):  # rows of whole vectors, past chunks
        table.append(Case("polar", "batch", ((batch, n, r),), torch.float32, "rows", quick=r <= 8))
    table.append(Case("polar", "empty", ((0, 7, 3),), quick=True))
    # Tall enough for threads to share the rows of one matrix, in every path and storage.
    for n, r, dtype, storage in (
        (20000, 1, torch.float32, "rows"),
        (20000, 32, torch.float32, "columns"),
        (14337, 16, torch.float32, "strided"),
        (9001, 33, torch.float64, "columns"),
        (7001, 64, torch.bfloat16, "rows"),
        (4099, 128, torch.float32, "columns"),
        (3301, 200, torch.float32, "rows"),
    ):
        table.append(Case("polar", "tall", ((n, r),), dtype, storage, quick=n > 14000))
    for r, n in ((5, 101), (32, 515)):
        for kind in ("condition10", "condition1000", "condition100000", "rank-deficient", "zero", "graded"):
            for dtype, storage in ((torch.float32, "rows"), (torch.float64, "columns")):
                table.append(Case("polar", kind, ((n, r),), dtype, storage, quick=r == 5))
                table.append(Case("polar", kind, ((n, r),), dtype, storage, method="svd"))
        for kind in ("orthonormal", "near-orthonormal"):
            for dtype in DTYPES:
                for method in ("auto", "newton_schulz", "svd"):
                    table.append(
                        Case("polar", kind, ((n, r),), dtype, "columns", method=method, quick=method == "auto")
                    )
    for kind in ("apart1e-06", "apart1e-12", "apart1e-13", "apart1e-14", "apart1e-15", "apart1e-17", "apart1e-30"):
        table.append(Case("polar", kind, ((40, 4),), torch.float64, "rows", quick=kind == "apart1e-14"))
        table.append(Case("polar", kind, ((5, 101, 9),), torch.float64, "columns", method="svd"))
        table.append(Case("polar", kind, ((40, 4),), torch.float32, "rows"))
    table.append(Case("polar", "condition1000", ((9001, 16),), torch.float32, "columns"))
    table.append(Case("polar", "rank-deficient", ((9001, 16),), torch.float32, "rows"))
    table.append(Case("polar", "rank-deficient", ((64, 64),), torch.float32, "rows"))
    for scale in (1e-38, 1e-30, 1e-20, 1e20, 1e30):  # the smallest is subnormal in part
        for shape in ((41, 7), (130, 33), (9001, 8)):
            table.append(Case("polar", "scale", (shape,), torch.float32, "columns", scale=scale, quick=shape[1] == 7))
    for scale in (1e-200, 1e-100, 1e100, 1e200):
        table.append(Case("polar", "scale", ((41, 7),), torch.float64, "rows", scale=scale))
        table.append(Case("polar", "scale", ((9001, 8),), torch.float64, "columns", scale=scale))
    table.append(Case("polar", "scale", ((41, 7),), torch.bfloat16, "rows", scale=1e30))
    table.append(Case("polar", "scale", ((41, 7),), torch.float16, "rows", scale=1e-4))
    return table


# A model's worth of unequal factors, the largest of which has more than its share of the work.
_MIXED = ((9001, 16), (37, 5), (16, 16), (1, 1), (515, 33), (1030, 8), (77, 1))
_SMALL = ((41, 7), (7, 7), (130, 33), (3, 1))


def _list_cases(operator: str) -> list[Case]:
    """What the operators over lists of factors share."""
    table = []
    for index, r in enumerate(RANKS):
        for kind_of, dtype in enumerate(_dtypes(r)):
            n = _heights(r, index + kind_of)
            storage = STORAGES[(index + kind_of + 1) % 3]
            table.append(Case(operator, "gaussian", ((n, r),), dtype, storage, quick=r in (1, 7, 32)))
    for index, dtype in enumerate((torch.float32, torch.float32, *DTYPES)):
        table.append(Case(operator, "list", _MIXED, dtype, STORAGES[index % 3], quick=index == 1))
    for n, r, dtype, storage in (
        (20000, 1, torch.float32, "rows"),
        (20000, 32, torch.float32, "columns"),
        (9001, 33, torch.float64, "strided"),
        (7001, 64, torch.bfloat16, "rows"),
        (4099, 128, torch.float32, "columns"),
    ):
        table.append(Case(operator, "tall", ((n, r),), dtype, storage, quick=n == 20000))
    return table


def _gradient_cases() -> list[Case]:
    table = _list_cases("riemannian_gradient_")
    for dtype in DTYPES:
        table.append(Case("riemannian_gradient_", "aligned", _SMALL, dtype, "columns", quick=True))
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        table.append(Case("riemannian_gradient_", "scale", _SMALL, torch.float32, "rows", scale=scale, quick=True))
    for index, dtype in enumerate(DTYPES):
        table.append(Case("riemannian_gradient_", "drifted", _SMALL, dtype, STORAGES[index % 3], quick=True))
        table.append(Case("riemannian_gradient_", "overflow", _SMALL, dtype, STORAGES[index % 3], quick=True))
    for shapes in (((9001, 16),), (_MIXED[1], _MIXED[0], _MIXED[4])):  # the tall one, whose rows are shared
        table.append(Case("riemannian_gradient_", "overflow", shapes, torch.float32, "columns", quick=True))
        table.append(Case("riemannian_gradient_", "drifted", shapes, torch.float32, "columns"))
    # near the end of the range, and within it: what a bound alone would refuse
    for dtype, scale in ((torch.float32, 1e37), (torch.bfloat16, 1e37), (torch.float16, 1e3)):
        table.append(Case("riemannian_gradient_", "large", _SMALL, dtype, "rows", scale=scale, quick=True))
    return table


def _retract_cases() -> list[Case]:
    table = _list_cases("project_retract_")
    for index, step in enumerate((0.0, 1e-6, 1e-3, 0.1, 0.5, 3.0, 1e2, 1e4)):
        for dtype in DTYPES:
            storage = STORAGES[index % 3]
            quick = dtype == torch.float32
            table.append(Case("project_retract_", "step", _SMALL, dtype, storage, scale=step, quick=quick))
        for dtype in (torch.float32, torch.float64):
            table.append(Case("project_retract_", "one-column", _SMALL, dtype, "columns", scale=step))
        table.append(Case("project_retract_", "step", ((9001, 16),), torch.float32, "rows", scale=step))
        table.append(Case("project_retract_", "step", _SMALL, torch.float32, "rows", scale=step, method="svd"))
        table.append(
            Case("project_retract_", "step", _SMALL, torch.float32, "rows", scale=step, method="newton_schulz")
        )
    for index, dtype in enumerate(DTYPES):
        table.append(Case("project_retract_", "drifted", _SMALL, dtype, STORAGES[index % 3], scale=0.2, quick=True))
    table.append(Case("project_retract_", "drifted", ((9001, 16),), torch.float32, "rows", scale=0.2))
    table.append(Case("project_retract_", "drifted", _SMALL, torch.float32, "rows", scale=0.2, method="svd"))
    for step in (1.0, 5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0):  # the columns' steps from this down to 1e-12 of it
        for dtype in (torch.float32, torch.float64):
            shapes = ((774, 6), (60, 8), (300, 16))
            table.append(Case("project_retract_", "graded", shapes, dtype, "rows", scale=step, quick=step == 20.0))
    for divisor in (0.3, 2.7, 100.0):
        table.append(Case("project_retract_", "step", _MIXED, torch.float32, "columns", 0.2, divisor, quick=True))
        table.append(Case("project_retract_", "step", _SMALL, torch.float64, "rows", 0.2, divisor))
        table.append(Case("project_retract_", "step", _SMALL, torch.bfloat16, "strided", 0.2, divisor))
    return table


def _adamw_cases() -> list[Case]:
    """Couplings are computed, float32 and float64 in turn within a list, and sign and betas alternate."""
    operator = "stella_adamw_"
    table = [replace(case, scale=0.2) for case in _list_cases(operator)]
    table.append(Case(operator, "coupled", ((9001, 16),), torch.float32, "columns", 0.2))
    # one row past whole vectors of every width, and past whole chunks
    table.append(Case(operator, "step", ((4097, 8), (769, 4), (17, 12)), torch.float32, "columns", 0.2, quick=True))
    for index, dtype in enumerate(DTYPES):
        storage = STORAGES[index % 3]
        for kind in ("coupled", "first", "drifted", "overflow", "refused"):
            table.append(Case(operator, kind, _SMALL, dtype, storage, 0.2, quick=True))
        table.append(Case(operator, "storages", _SMALL, dtype, scale=0.2, quick=True))
        for step in (0.0, 1e-6, 1e-3, 0.5, 3.0, 1e2, 1e4):
            table.append(Case(operator, "step", _SMALL, dtype, storage, step, quick=dtype == torch.float32))
    for kind in ("overflow", "refused"):  # the tall one, whose rows are shared, is the second, and alone
        table.append(Case(operator, kind, (_MIXED[1], _MIXED[0]), torch.float32, "columns", 0.2, quick=True))
        table.append(Case(operator, kind, ((20000, 8),), torch.float32, "rows", 0.2, quick=True))
    table.append(Case(operator, "storages", _MIXED, torch.float32, scale=0.2, quick=True))
    for step in (1e-3, 3.0, 1e4):
        table.append(Case(operator, "step", ((9001, 16),), torch.float32, "rows", step))
        table.append(Case(operator, "step", ((9001, 16),), torch.float32, "columns", step))
    for kind in ("gradient1e-12", "gradient1e-06", "gradient1e+06", "gradient1e+12"):
        table.append(Case(operator, kind, _SMALL, torch.float32, "columns", 0.2, quick=True))
    for divisor in (0.3, 2.7, 100.0):
        table.append(Case(operator, "step", _MIXED, torch.float32, "columns", 0.2, divisor, quick=True))
        table.append(Case(operator, "step", _SMALL, torch.float64, "rows", 0.2, divisor))
    return table


# The last three: several chunks of rows, groups of threads and blocks of features, ranks that shorten the blocks.
_ADAPTERS = (
    *((5, 7, 9, 3), (1, 1, 1, 1), (33, 65, 48, 16), (130, 17, 31, 17), (0, 6, 5, 2)),
    *((300, 1000, 577, 8), (257, 99, 2003, 33), (131, 1201, 130, 130)),
)


def _adapter_cases() -> list[Case]:
    table = []
    for operator in ("adapter_forward_", "adapter_product", "adapter_backward_"):
        for index, shape in enumerate(_ADAPTERS):
            for dtype in DTYPES:
                for dropout in (0.0, 0.3):
                    diagonal = (index + int(dropout > 0)) % 2 == 1
                    storage = STORAGES[index % 3]
                    table.append(
                        Case(
                            operator,
                            "adapter",
                            (shape,),
                            dtype,
                            storage,
                            dropout=dropout,
                            diagonal=diagonal,
                            quick=index == 2,
                        )
                    )
    for dtype in DTYPES:
        for x in ((129, 67), (1, 1), (0, 4)):
            table.append(Case("philox_dropout", "mask", (x,), dtype, dropout=0.2, quick=True))
        table.append(Case("philox_dropout", "mask", ((31, 17),), dtype, "strided", dropout=0.9))
    return table


def cases(quick: bool = False) -> list[Case]:
    """The table; ``quick`` leaves a part of it that takes about a second and still reaches every path."""
    table = _polar_cases() + _gradient_cases() + _retract_cases() + _adamw_cases() + _adapter_cases()
    return [case for case in table if case.quick or not quick]

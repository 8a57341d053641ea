"""The adapter's Triton kernels beyond the table of cases, in the interpreter: a line as those of ``triton_cases``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from stella_kernels.operators.fallback import REFERENCE
from stella_kernels.reference import adapter, philox
from stella_kernels.triton_kernels.adapter import (
    configuration as adapter_configuration,
)
from stella_kernels.triton_kernels.adapter import (
    launches as adapter_launches,
)
from stella_kernels.triton_kernels.adapter import (
    operators as adapter_operators,
)
from stella_kernels.triton_kernels.adapter.configuration import PassTiles
from stella_kernels.triton_kernels.registration import operators

OPERATORS = operators()
adapter_backward_, adapter_forward_ = OPERATORS["adapter_backward_"], OPERATORS["adapter_forward_"]
adapter_product, philox_dropout = OPERATORS["adapter_product"], OPERATORS["philox_dropout"]

Check = tuple[str, str, float, float]  # case, what, error, tolerance
SCALE = 1.3


def small_tiles(kernel: str, R: int, dtype: torch.dtype, backend: str, wide: bool = False) -> PassTiles:
    """Of which every matrix has several, the last of them in part; rows and columns are shared by programs."""
    return PassTiles(16, 16 if kernel in ("accumulate", "contract") else 8, 4, 2, 12)


def use_small_tiles() -> None:
    adapter_configuration.default_tiles = small_tiles
    adapter_launches.SUM_ITEMS = 64
    adapter_operators.DROPOUT_TILE = (16, 32)


def _problem(T: int, m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (T, n), "y": (T, m), "grad_y": (T, m), "U": (m, r), "S": (r, r), "Vt": (r, n)}
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: value.to(masters if name in ("U", "S", "Vt") else dtype) for name, value in values.items()}


def _error(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        return math.inf
    return float((value.double() - exact).norm()) / max(float(exact.norm()), 1e-300)


def _bound(dtype: torch.dtype, longest: int) -> float:
    """As in ``verification``: five roundings to storage, and sums of ``longest`` terms in the arithmetic's dtype."""
    w = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return 8 * (torch.finfo(dtype).eps + w * math.sqrt(longest))


def _compare(name: str, t: dict[str, Tensor], p: float, dtype: torch.dtype) -> Iterator[Check]:
    """Forward and backward of operators on ``t`` against float64."""
    seed = torch.randint(-(2**63), 2**63 - 1, ()) if p else None
    exact = {key: value.double() for key, value in t.items()}
    factors, wide = (t["U"], t["S"], t["Vt"]), (exact["U"], exact["S"], exact["Vt"])
    term, exact_A = adapter.adapter_forward(exact["x"], *wide, SCALE, p, seed)
    wanted = adapter.adapter_backward(exact["grad_y"], exact["x"], *wide, SCALE, p, seed)
    bound = _bound(dtype, max(*t["x"].shape, t["y"].shape[1]))
    y = t["y"].clone()
    A = adapter_forward_(y, t["x"], *factors, SCALE, p, seed)
    grad_x = torch.randn(t["x"].shape, dtype=dtype)
    before = grad_x.double()
    grads = adapter_backward_(grad_x, 0.5, t["grad_y"], t["x"], A, *factors, SCALE, p, seed, [True] * 3)
    yield name, "A", _error(A, exact_A), bound
    yield name, "y", _error(y, exact["y"] + term), bound
    yield name, "gradient of x", _error(grad_x, 0.5 * before + wanted.x), bound
    for what, value, right in zip(("U", "S", "Vt"), grads, wanted[1:], strict=True):
        yield name, f"gradient of {what}", _error(value, right), bound
        yield name, f"dtype of {what}", float(value.dtype != t[what].dtype), 0.0


def storages() -> Iterator[Check]:
    """Each operand by its strides, of dtypes that differ, and offsets in 64 bits."""
    T, m, n, r = 50, 37, 44, 5
    transposed = {key: value.T.contiguous().T for key, value in _problem(T, m, n, r).items()}
    yield from _compare("transposed", transposed, 0.25, torch.float32)
    gaps = {key: torch.full((2 * a, 3 * b), math.nan)[::2, 1::3].copy_(value)
            for key, value in _problem(T, m, n, r).items() for a, b in [value.shape]}  # fmt: skip
    yield from _compare("gaps", gaps, 0.25, torch.float32)
    mixed = _problem(T, m, n, r, torch.bfloat16)
    mixed |= {"x": torch.randn(T, n), "U": mixed["U"].double(), "Vt": mixed["Vt"].half()}
    yield from _compare("mixed dtypes", mixed, 0.25, torch.bfloat16)
    index = adapter_launches._index
    adapter_launches._index = lambda *arguments: tl.int64
    yield from _compare("64-bit offsets", _problem(T, m, n, r), 0.25, torch.float32)
    adapter_launches._index = index


def ranks() -> Iterator[Check]:
    """Every padded rank's first and last, and what is left to the reference."""
    for r in (1, 16, 17, 32, 64, 65, 128, 129):
        yield from _compare(f"rank {r}", _problem(35, 40, 36, r), 0.0, torch.float32)


def masks() -> Iterator[Check]:
    """The mask of each kernel is the reference's, bit by bit; V and U are the identity, so that it shows."""
    for T, n in ((37, 64), (37, 61), (5, 3)):
        eye = torch.eye(n)
        for p in (0.05, 0.5, 1.0):
            seed = torch.randint(-(2**63), 2**63 - 1, ())
            x = torch.randn(T, n)
            exact = philox.dropout(x, p, seed)
            name = f"mask {T}x{n} p={p}"
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                same = torch.equal(philox_dropout(x.to(dtype), p, seed), philox.dropout(x.to(dtype), p, seed))
                yield name, f"philox_dropout {dtype}", float(not same), 0.0
            y = torch.zeros(T, n)
            A = adapter_forward_(y, x, eye, eye, eye, 1.0, p, seed)
            for what, value in (("A", A), ("y", y)):
                yield name, what, float(((value != 0) != (exact != 0)).sum()), 0.0
            grad_x = torch.full((T, n), math.nan)
            # with K = grad_y = 1s in row t alone, ∂Vᵀ would hold d(x) of that row; here it is their sum, of one sign
            grads = adapter_backward_(
                grad_x, 0.0, torch.ones(T, n), x.abs(), A, eye, eye, eye, 1.0, p, seed, [False, False, True]
            )
            kept = philox.dropout_mask((T, n), p, seed)
            yield name, "gradient of x", float(((grad_x != 0) != kept).sum()), 0.0
            column_sums = philox.dropout(x.abs().double(), p, seed).sum(0).expand(n, n)
            yield name, "gradient of Vt", _error(grads[2], column_sums), _bound(torch.float32, T)


def gradients_asked_for() -> Iterator[Check]:
    """Every choice of gradients is what the whole is, bit by bit, and nothing else is written."""
    t = _problem(45, 33, 28, 3)
    seed, S = torch.tensor(7), torch.randn(3)
    for core in (t["S"], S):
        factors = (t["U"], core, t["Vt"])
        A = adapter_forward_(t["y"].clone(), t["x"], *factors, SCALE, 0.3, seed)
        whole: tuple[Tensor, ...] | None = None
        for choice in range(16, 0, -1):
            needed = [bool((choice - 1) >> bit & 1) for bit in range(3)]
            grad_x = torch.full_like(t["x"], math.nan) if (choice - 1) & 8 else None
            arguments = (0.0, t["grad_y"], t["x"], A, *factors, SCALE, 0.3, seed, needed)
            found = (*adapter_backward_(grad_x, *arguments), grad_x)
            whole = whole or found
            for value, same, is_needed in zip(found, whole, (*needed, grad_x is not None), strict=True):
                if is_needed:
                    yield f"needed {choice - 1:04b}", "differs", float(not torch.equal(value, same)), 0.0
                elif value is not None:
                    yield f"needed {choice - 1:04b}", "elements", float(value.numel()), 0.0


def nothing_to_do() -> Iterator[Check]:
    """No rows, no columns: what the reference gives."""
    for T, m, n in ((0, 6, 5), (9, 0, 5), (9, 6, 0)):
        t = _problem(T, m, n, 2)
        factors = (t["U"], t["S"], t["Vt"])
        y = t["y"].clone()
        A = adapter_forward_(y, t["x"], *factors, SCALE, 0.0, None)
        exact_y = t["y"].clone()
        exact_A = REFERENCE["adapter_forward_"](exact_y, t["x"], *factors, SCALE, 0.0, None)
        backward = []
        for operator in (adapter_backward_, REFERENCE["adapter_backward_"]):
            grad_x = torch.full((T, n), math.nan)
            backward.append(
                (*operator(grad_x, 0.0, t["grad_y"], t["x"], A, *factors, SCALE, 0.0, None, [True] * 3), grad_x)
            )
        for value, exact in zip((y, A, *backward[0]), (exact_y, exact_A, *backward[1]), strict=True):
            yield f"empty {T}x{m}x{n}", "value", _error(value, exact.double()), 1e-6
        b = torch.randn(m)
        product = adapter_product(t["x"], b, *factors, SCALE, 0.0, None)[0]
        yield f"empty {T}x{m}x{n}", "product", _error(product, (exact_y - t["y"] + b).double()), 1e-6


def repeats() -> Iterator[Check]:
    """Programs run in another order each time: the bits are the same."""
    t = _problem(90, 70, 52, 9, torch.bfloat16)
    factors, seed = (t["U"], t["S"], t["Vt"]), torch.tensor(11)

    def run() -> list[Tensor]:
        y, grad_x = t["y"].clone(), torch.full_like(t["x"], math.nan)
        A = adapter_forward_(y, t["x"], *factors, SCALE, 0.1, seed)
        grads = adapter_backward_(grad_x, 0.0, t["grad_y"], t["x"], A, *factors, SCALE, 0.1, seed, [True] * 3)
        # recomputed beside an output without columns
        again = adapter_forward_(y[:, :0], t["x"], t["U"][:0], t["S"], t["Vt"], SCALE, 0.1, seed)
        return [y, A, grad_x, *grads, (again != A).sum()]

    first = run()
    for value, other in zip(first, run(), strict=True):
        yield "repeats", "differs", float(not torch.equal(value, other)), 0.0
    yield "repeats", "recomputed A differs", float(first[-1]), 0.0


def not_finite() -> Iterator[Check]:
    """A row that is not finite spoils no other row of A, y and ∂x."""
    t = _problem(40, 20, 24, 4)
    t["x"][21, 3], t["grad_y"][17, 5] = math.inf, math.nan
    factors = (t["U"], t["S"], t["Vt"])
    y, grad_x = t["y"].clone(), torch.zeros(40, 24)
    A = adapter_forward_(y, t["x"], *factors, SCALE, 0.0, None)
    adapter_backward_(grad_x, 0.0, t["grad_y"], t["x"], A, *factors, SCALE, 0.0, None, [True] * 3)
    for what, value, row in (("A", A, 21), ("y", y, 21), ("gradient of x", grad_x, 17)):
        bad = ~value.isfinite().all(1)
        yield "not finite", what, float(not (bool(bad[row]) and int(bad.sum()) == 1)), 0.0


def refusals() -> Iterator[Check]:
    """Arguments that do not belong together are errors that name them, and nothing is written."""
    t = _problem(6, 5, 4, 2)
    y = t["y"].clone()
    good: dict[str, Any] = {"y": y, "x": t["x"], "U": t["U"], "S": t["S"], "Vt": t["Vt"]}
    good |= {"scale": 1.0, "p": 0.0, "seed": None}
    for name, value in (
        *(("Vt", t["Vt"][:1]), ("S", t["S"][:, :1]), ("y", y[:5]), ("x", t["x"][0])),
        *(("p", 1.5), ("p", -0.1), ("p", 0.5)),
    ):
        try:
            OPERATORS["adapter_forward_"](*(good | {name: value}).values())
            missed = 1.0
        except RuntimeError as error:
            named = "seed" if isinstance(value, float) and value == 0.5 else name
            missed = float(f"{named}" not in str(error) or "wanted" not in str(error))
        yield f"refuses {name}", "no error that names it", missed, 0.0
    for name, value, wanted in (
        ("y", y[:1].expand(6, 5), "several elements in one place"),
        ("x", y[:, :4], "y: found memory that x has as well"),
        ("x", t["x"].to_sparse(), "x: found layout torch.sparse_coo"),
        ("U", t["U"].to(torch.complex64), "complex factors are not supported"),
    ):
        yield f"refuses {wanted}", "no error that names it", _missed(good | {name: value}, wanted), 0.0
    yield "refusals", "written", float(not torch.equal(y, t["y"])), 0.0
    yield from _list_refusals()


def _missed(arguments: dict[str, Any], wanted: str, operator: str = "adapter_forward_") -> float:
    try:
        OPERATORS[operator](*arguments.values())
    except RuntimeError as error:
        return float(wanted not in str(error))
    return 1.0


def _list_refusals() -> Iterator[Check]:
    """Of lists, by place, and the first of the list is not written either; also where a table of addresses is kept."""
    factors = [torch.eye(8, 2), torch.eye(8, 2)]
    gradients = [torch.ones(8, 2), torch.ones(8, 2)]
    good: dict[str, Any] = {"gradients": gradients, "factors": factors, "snapshots": []}
    for value, wanted in (
        (torch.ones(1, 2).expand(8, 2), "gradients[1]: found strides (0, 1)"),
        (torch.ones(8, 2, dtype=torch.float64), "gradients[1]: found (8, 2), torch.float64"),
        (torch.ones(8, 2).to_sparse(), "gradients[1]: found (8, 2), torch.float32 on cpu of layout torch.sparse_coo"),
        (factors[1], "gradients[1]: found memory that factors[1] has as well"),
        (gradients[0], "has as well"),
    ):
        for _ in range(2):
            missed = _missed(good | {"gradients": [gradients[0], value]}, wanted, "riemannian_gradient_")
            yield f"refuses {wanted}", "no error that names it", missed, 0.0
    yield "refusals", "written", float(not torch.equal(gradients[0], torch.ones(8, 2))), 0.0


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    *(storages, ranks, masks, gradients_asked_for, nothing_to_do, repeats, not_finite, refusals),
)

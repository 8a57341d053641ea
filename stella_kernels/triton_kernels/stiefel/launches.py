"""The operators of the Stiefel step on Triton: their launches, a constant number whatever the factors."""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ...operators import signatures
from ...operators.status import INFO_COLUMNS
from ..launch.configuration import FUSION, arithmetic, element, precision
from ..launch.device import Shared, capturing, keep_for_graphs, on_device_of, sent, target_arch, target_backend
from ..launch.table import Table, identity_of, met_before, table_of
from . import options
from .gradient import coupling_kernel, coupling_sum_kernel, subtract_kernel
from .moves import ADAMW, POLAR, RETRACT, SETTINGS
from .passes import gram_kernel, update_kernel
from .solve import WORKSPACE, solve_kernel

Arguments = dict[str, Any]


def common(table: Table, gradient: bool = False) -> Arguments:
    """The compile-time arguments of the passes over rows."""
    tiles = table.tiles
    return {
        "ELEMENT": element(table.dtype),
        "TO": element(arithmetic(table.dtype)),
        "PRECISION": precision(table.dtype, target_backend(), gradient),
        "INDEX": table.INDEX,
        "R": table.R,
        "BLOCK": tiles.block,
        "CHUNK": tiles.chunk,
        "num_warps": tiles.warps,
        **FUSION,
    }


def _couple(table: Table, settings: Tensor | None, info: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Couplings (k, R, R), state (k,) and the flag of a refused gradient: two launches.

    ``settings`` are those of the AdamW step, whose factor comes first; without them the gradient does, and the drift of
    the factors is computed.
    """
    GRADIENT, FACTOR, DRIFT = (0, 1, True) if settings is None else (1, 0, False)
    constants = common(table, gradient=True)
    R = table.R
    partials = table.scratch(table.count, 2 if DRIFT else 1, R, R)
    largest = table.scratch(table.count)
    refused = table.scratch(1, dtype=torch.int32)
    couplings = table.scratch(table.factors, R, R)
    state = table.scratch(table.factors, dtype=torch.int32)
    SPLIT = DRIFT and table.tiles.slab < R
    coupling_kernel[(table.count, 2 if SPLIT else 1)](
        *(table.items, table.rows, partials, largest, refused, 1.0),
        **{"GRADIENT": GRADIENT, "FACTOR": FACTOR, "DRIFT": DRIFT, "SPLIT": SPLIT, "NORM": False},
        **constants,
    )
    constants.pop("CHUNK")
    coupling_sum_kernel[(table.factors,)](
        *(table.rows, info if settings is None else settings, partials, largest, refused, couplings, state, info),
        **{"GRADIENT": GRADIENT, "FACTOR": FACTOR, "DRIFT": DRIFT, "ITEMS": table.tiles.items},
        **constants | options.ATTEMPT | options.sum_options(target_backend()),
    )
    return couplings, state, refused


def gram(
    table: Table, KIND: int, settings: Tensor, state: Tensor, refused: Tensor, couplings: Tensor | None, STEPS: bool
) -> Tensor:
    """Gram blocks of every item (count, 3, R, R), the moments advanced before: a launch, two past rank 64 for these."""
    R, tiles = table.R, table.tiles
    partials = table.scratch(table.count, 3, R, R)
    constants = {"KIND": KIND, "STEPS": STEPS, "SLAB": tiles.slab, **common(table)}
    APART = tiles.halves and options.lays_apart(R, target_arch())
    HALVES = options.holds_halves(tiles.halves, KIND, R, target_arch())
    given = couplings if couplings is not None else partials
    inputs = (table.items, table.rows, settings, given, state, refused, partials, 1.0)
    advance = KIND == ADAMW
    bits = 8 * table.dtype.itemsize
    if advance and options.advances_alone(tiles.slab == R, tiles.halves, STEPS, bits, target_arch()):
        gram_kernel[(table.count, 1)](
            *inputs, ADVANCE=True, GRAM=False, HALVES=False, APART=False, **constants | tiles.streaming(R)
        )
        advance = False
    greedy = options.gram_options(target_backend(), KIND, R)
    gram_kernel[(table.count, R // tiles.slab)](
        *inputs,
        ADVANCE=advance,
        GRAM=True,
        HALVES=HALVES,
        APART=APART,
        **constants | {"num_warps": options.gram_warps(tiles, KIND)} | greedy,
    )
    return partials


def solve(
    table: Table, rows: Tensor, KIND: int, settings: Tensor, partials: Tensor, state: Tensor, refused: Tensor,
    info: Tensor, STEPS: bool, SHARDED: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Coefficients (k, 2, R, R) and scales (k,) of the update: a launch. ``rows`` says which partials are whose."""
    R, tiles = table.R, table.tiles
    coefficients = table.scratch(table.factors, 2, R, R)
    scales = table.scratch(table.factors)
    programs = min(table.factors, options.PROGRAMS)
    workspace = table.scratch(programs, WORKSPACE, R, R, dtype=torch.float64)
    constants = common(table)
    solve_kernel[(programs,)](
        *(rows, settings, partials, coefficients, scales, state, refused, workspace, info),
        *(table.factors, torch.finfo(arithmetic(table.dtype)).eps / 2),
        **{"KIND": KIND, "STEPS": STEPS, "SHARDED": SHARDED},
        **{name: constants[name] for name in ("ELEMENT", "TO", "PRECISION", "INDEX", "R")},
        **{"T": tiles.small, "T64": tiles.small64, "ROWS": tiles.rows64, "num_warps": options.solve_warps(tiles, KIND)},
        **options.solve_options(target_backend()),
    )
    return coefficients, scales


def update(
    table: Table, KIND: int, settings: Tensor, coefficients: Tensor, scales: Tensor, state: Tensor, STEPS: bool
) -> None:
    """The factors' new rows in place: a launch."""
    update_kernel[(table.count,)](
        *(table.items, table.rows, settings, coefficients, scales, state),
        **{"KIND": KIND, "STEPS": STEPS, **common(table)}
        | table.tiles.streaming(table.R)
        | options.update_options(target_backend(), KIND, table.R),
    )


def _retract(
    table: Table, KIND: int, settings: Tensor, state: Tensor, refused: Tensor, info: Tensor,
    couplings: Tensor | None = None, STEPS: bool = False
) -> None:  # fmt: skip
    """Gram blocks, solve, update: three launches, four where the moments are advanced by one of their own."""
    partials = gram(table, KIND, settings, state, refused, couplings, STEPS)
    coefficients, scales = solve(table, table.rows, KIND, settings, partials, state, refused, info, STEPS)
    update(table, KIND, settings, coefficients, scales, state, STEPS)


def _new_info(table: Table) -> Tensor:
    return table.scratch(table.factors, INFO_COLUMNS, dtype=torch.float64)


def to_device(settings: Tensor, device: torch.device, operator: str) -> Tensor:
    """Without waiting for it: one copy from pinned memory, none where the settings are on the device already."""
    if settings.device == device:
        return settings.contiguous()
    if capturing(device):
        raise RuntimeError(
            f"{operator}: hyperparameters: found on {settings.device} while a CUDA graph is captured, which would "
            f"replay this step's learning rate and count for ever; wanted on {device}, written before each replay."
        )
    return sent(settings, device)


def riemannian_gradient_(a: signatures.RiemannianGradient, table: Table) -> Tensor:
    """∇ ← ∇ − Y ∇ᵀ Y in place: three launches; ``info`` stays on the device."""
    with on_device_of(a.gradients[0]):
        info = _new_info(table)
        couplings, state, refused = _couple(table, None, info)
        subtract_kernel[(table.count,)](
            *(table.items, table.rows, couplings, state, refused),
            SNAPSHOTS=bool(a.snapshots),
            **common(table, gradient=True) | table.tiles.streaming(table.R),
        )
    return info


_divisors: dict[tuple[object, ...], Shared] = {}
_one_at_a_time = RLock()  # of threads that look for divisors


def settings_of(divisors: Sequence[float], device: torch.device) -> Tensor:
    """(k, 7) settings of which only the divisors count; the same every step, so that they are copied once."""
    key = (device, *divisors)
    with _one_at_a_time:
        known = _divisors.get(key)
        if known is None:
            settings = torch.zeros(len(divisors), SETTINGS, dtype=torch.float64)
            settings[:, 5] = torch.tensor(list(divisors), dtype=torch.float64)
            known = Shared(sent(settings, device))
            if not capturing(device):  # else they have no contents before the graph's first replay
                if len(_divisors) > 16:
                    _divisors.clear()
                _divisors[key] = known
        known.use()
    keep_for_graphs(device, known)
    return known.tensors[0]


def project_retract_(a: signatures.ProjectRetract, table: Table) -> Tensor:
    """Scale, project, retract in place: three launches; ``info`` stays on the device."""
    with on_device_of(a.moved[0]):
        info = _new_info(table)
        state = table.scratch(table.factors, dtype=torch.int32)
        _retract(table, RETRACT, settings_of(a.divisors, table.device), state, state, info)
    return info


def keeps_steps(dtype: torch.dtype) -> bool:
    """Moments of half the width are rounded when stored: the steps that the Gram blocks saw are kept beside them."""
    return dtype in (torch.bfloat16, torch.float16)


def stella_adamw_(a: signatures.StellaAdamWStep, table: Table) -> Tensor:
    """The whole step: five launches, six past rank 64; ``info`` stays on the device."""
    steps = keeps_steps(table.dtype)
    with on_device_of(a.factors[0]):
        info = _new_info(table)
        settings = to_device(a.hyperparameters, table.device, a.name)
        known, state, refused = _couple(table, settings, info)
        _retract(table, ADAMW, settings, state, refused, info, known, steps)
    return info


def polar_of(M: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factors of a batch (B, n, r) and ``info`` on the device, with a status for each: three launches."""
    Q = torch.empty_like(M, memory_format=torch.contiguous_format)
    columns = list(M.unbind(0)), list(Q.unbind(0))
    identity = identity_of(columns)
    table = met_before(identity) or table_of(identity, columns)
    with on_device_of(M):
        info = _new_info(table)
        state = table.scratch(table.factors, dtype=torch.int32)
        _retract(table, POLAR, info, state, state, info)
    return Q, info

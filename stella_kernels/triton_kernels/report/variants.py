"""Every kernel as it is launched at its defaults: what ``compile-report`` compiles ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from ..launch.configuration import FUSION, arithmetic, element, precision, tiles_for
from ..stiefel.gradient import coupling_kernel, coupling_sum_kernel, subtract_kernel
from ..stiefel.moves import ADAMW, POLAR, RETRACT
from ..stiefel.options import (
    ATTEMPT,
    advances_alone,
    gram_options,
    gram_warps,
    holds_halves,
    lays_apart,
    solve_options,
    solve_warps,
    sum_options,
    update_options,
)
from ..stiefel.passes import gram_kernel, update_kernel
from ..stiefel.solve import solve_kernel
from ..stiefel.sums import pack_kernel, unpack_kernel
from .adapter_variants import adapter_variants
from .compiled import Variant

RANKS = (16, 32, 64, 128)


def _types(dtype: torch.dtype) -> dict[str, str]:
    wide = "fp64" if arithmetic(dtype) == torch.float64 else "fp32"
    scratch = "partials", "largest", "couplings", "coefficients", "scales", "norms", "flat", "sums", "grams", "blocks"
    types = dict.fromkeys(scratch, f"*{wide}")
    types |= dict.fromkeys(("items", "table", "places"), "*i64") | dict.fromkeys(("refused", "state"), "*i32")
    types |= dict.fromkeys(("settings", "workspace", "info"), "*fp64")
    return types | {"one": "fp32", "tolerance": "fp32", "factors": "i32"}


def stiefel_variants(
    R: int, dtype: torch.dtype = torch.float32, backend: str = "cuda", arch: object = None
) -> Iterator[Variant]:
    """The launches of the grouped operators, their phases and the polar factor at padded rank R."""
    tiles, types = tiles_for(R, dtype), _types(dtype)
    common = {
        "ELEMENT": element(dtype),
        "TO": element(arithmetic(dtype)),
        "PRECISION": precision(dtype, backend),
        "INDEX": tl.int32,
        "R": R,
        "BLOCK": tiles.block,
        "SLAB": tiles.slab,
        "CHUNK": tiles.chunk,
    }
    apart = tiles.halves and lays_apart(R, arch)

    def variant(name: str, kernel: Any, constants: dict[str, Any], products: bool = True, wide: bool = True) -> Variant:
        warps = constants.get("num_warps", tiles.warps)
        used = {key: value for key, value in (common | constants).items() if key in kernel.arg_names}
        label = f"{name} {str(dtype).removeprefix('torch.')} R={R}"
        options = solve_options(backend) if kernel is solve_kernel else FUSION
        if kernel is coupling_sum_kernel:
            options = sum_options(backend)
        if kernel is gram_kernel:
            options = gram_options(backend, used["KIND"], R)
        if kernel is update_kernel:
            options = update_options(backend, used["KIND"], R)
        return Variant(label, kernel, used, warps, products, wide, types, options)

    for name, places in (
        ("gradient", {"GRADIENT": 0, "FACTOR": 1, "DRIFT": True}),
        ("adamw", {"GRADIENT": 1, "FACTOR": 0, "DRIFT": False}),
    ):
        split = {"SPLIT": places["DRIFT"] and tiles.slab < R}
        yield variant(f"{name} coupling", coupling_kernel, places | split | {"NORM": False})
        summed = places | ATTEMPT | {"ITEMS": tiles.items}
        yield variant(f"{name} coupling sum", coupling_sum_kernel, summed, products=False, wide=False)
    yield variant("subtract", subtract_kernel, {"SNAPSHOTS": True, **tiles.streaming(R)})
    first = {"GRADIENT": 0, "FACTOR": 1, "DRIFT": True, "SPLIT": tiles.slab < R, "NORM": True}
    yield variant("phases' coupling", coupling_kernel, first)
    summed = {"NORM": True, "BLOCKS": 2, "T": tiles.small, "ITEMS": tiles.items}
    yield variant("phases' pack", pack_kernel, summed, products=False, wide=False)
    unpacked = {"COUPLING": False, "T": tiles.small}
    yield variant("phases' unpack", unpack_kernel, unpacked, products=False, wide=False)
    steps = dtype in (torch.bfloat16, torch.float16)
    kinds = [("polar", POLAR, False), ("retract", RETRACT, False), ("adamw", ADAMW, steps)]
    for name, KIND, STEPS in kinds if steps else [*kinds, ("phases' adamw", ADAMW, True)]:
        kind = {"KIND": KIND, "STEPS": STEPS}
        advance = KIND == ADAMW
        if advance and advances_alone(tiles.slab == R, tiles.halves, STEPS, 8 * dtype.itemsize, arch):
            alone = {"ADVANCE": True, "GRAM": False, "HALVES": False, "APART": False, **tiles.streaming(R)}
            yield variant(f"{name} advance", gram_kernel, kind | alone)
            advance = False
        halves = holds_halves(tiles.halves, KIND, R, arch)
        blocks = {**kind, "ADVANCE": advance, "GRAM": True, "HALVES": halves, "APART": apart}
        yield variant(f"{name} gram", gram_kernel, blocks | {"num_warps": gram_warps(tiles, KIND)})
        yield variant(f"{name} update", update_kernel, kind | tiles.streaming(R))
    small = {"T": tiles.small, "T64": tiles.small64, "ROWS": tiles.rows64}
    for name, KIND, STEPS in (*kinds, ("phases'", RETRACT, False)):
        solved = {
            "KIND": KIND,
            "STEPS": STEPS,
            "SHARDED": name == "phases'",
            "num_warps": solve_warps(tiles, KIND),
            **small,
        }
        yield variant(f"{name} solve", solve_kernel, solved, products=dtype != torch.float64, wide=False)


def variants(ranks: tuple[int, ...] = RANKS, backend: str = "cuda", arch: object = None) -> Iterator[Variant]:
    """All of them."""
    for R in ranks:
        yield from stiefel_variants(R, torch.float32, backend, arch)
        for dtype in (torch.bfloat16, torch.float32):
            yield from adapter_variants(R, dtype, backend)

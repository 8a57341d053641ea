"""The adapter's kernels as they are launched, at their defaults and at what autotuning tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from ..adapter.configuration import (
    DROPOUT_TILE,
    SUM_ITEMS,
    PassTiles,
    candidate_tiles,
    core_precision,
    default_tiles,
    fuses_core,
    joins_contractions,
    joins_core_gradient,
    launch_options,
)
from ..adapter.dropout import dropout_kernel
from ..adapter.forward import accumulate_kernel, core_kernel, project_kernel
from ..adapter.gradient import contract_kernel, core_gradient_kernel, spread_kernel, sum_kernel
from ..launch.configuration import arithmetic, element, precision
from .compiled import Variant

_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# Rows of activations and both storages of the factors as the layers have them, side by side in memory.
_UNIT_STRIDES = ("x_column", "y_column", "g_column", "u_column", "v_column", "s_column")
_INTEGERS = (
    *("T", "n", "m", "r", "width", "chunk", "splits", "bias_step", "threshold"),
    *("x_row", "y_row", "g_row", "u_row", "v_row", "v_column", "s_row"),
    *(f"{name}_{factor}" for name in ("size", "chunks") for factor in "UVS"),
)
_ANY = ("T", "splits", "bias_step", "threshold", "chunks_U", "chunks_V", "chunks_S")  # what is no multiple of 16


def _types(dtype: torch.dtype) -> dict[str, str]:
    wide = arithmetic(dtype)
    types = dict.fromkeys(("x", "y", "bias", "grad_x", "grad_y", "A", "P", "K", "out"), _POINTERS[dtype])
    types |= dict.fromkeys(("U", "S", "Vt", "grad_U", "grad_S", "grad_V"), _POINTERS[wide])
    types |= dict.fromkeys(("partials", "partial_Q", "partial_U", "partial_V", "partial_S"), _POINTERS[wide])
    types |= dict.fromkeys(_INTEGERS, "i32") | dict.fromkeys(("scale", "inverse", "beta"), "fp64")
    return types | {"seed": "*i64"}


def _variant(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    R: int,
    dtype: torch.dtype,
    backend: str,
    warps: int = 4,
    stages: int = 3,
    products: bool = True,
    wide: bool = False,
) -> Variant:
    common = {
        **{"OPERAND": element(dtype), "DOT": element(dtype), "TO": element(arithmetic(dtype)), "INDEX": tl.int32},
        **{"PRECISION": precision(dtype, backend), "CORE": core_precision(dtype, backend), "R": R, "DIAGONAL": False},
        **dict.fromkeys(_UNIT_STRIDES, 1),
        **dict.fromkeys(("NEED_Q", "NEED_U", "NEED_S", "NEED_X", "NEED_V"), True),
        **{"DROPS_ALL": False, "READ": True, "BIAS": False, "KEEP": True},
    }
    given = {key: value for key, value in (common | constants).items() if value is not None}
    used = {key: value for key, value in given.items() if key in kernel.arg_names}
    divisible = tuple(key for key in kernel.arg_names if key in _INTEGERS and key not in _ANY)
    label = f"adapter {name} {str(dtype).removeprefix('torch.')} R={R}"
    products = products and not constants.get("DIAGONAL", False)  # a diagonal S scales columns
    options = {"num_stages": stages, **launch_options(backend)}
    types = _types(dtype) | ({"x": "*fp32"} if wide else {})
    return Variant(label, kernel, used, warps, products, True, types, options, divisible)


def _launches(R: int, dtype: torch.dtype) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Name, whose tiles, kernel and switches of the launches that read activations or what they are projected to."""
    if fuses_core(R, dtype):
        yield "project", "project", project_kernel, {"SPLIT": False, "DROPOUT": False}
    yield "project split dropout", "project", project_kernel, {"SPLIT": True, "DROPOUT": True}
    for name, diagonal in (("core", False), ("core diagonal", True)):
        yield name, "core", core_kernel, {"DIAGONAL": diagonal}
    yield "accumulate", "accumulate", accumulate_kernel, {}
    joined = joins_contractions(R, dtype)
    if not joined:  # Q = Y' U is projected as x is, by the transpose of U: side by side are its ranks
        transposed = {"v_row": 1, "v_column": None}
        yield "project gradient", "project", project_kernel, {"SPLIT": True, "DROPOUT": False, **transposed}
    yield "contract", "contract", contract_kernel, {"NEED_Q": joined}
    for name, diagonal in (("core gradient", False), ("core gradient diagonal", True)):
        yield name, "core", core_gradient_kernel, {"NEED_K": joins_core_gradient(R), "DIAGONAL": diagonal}
    yield "spread", "spread", spread_kernel, {"DROPOUT": False}
    yield "spread dropout", "spread", spread_kernel, {"DROPOUT": True}


def _sizes(tiles: PassTiles) -> dict[str, int]:
    return {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "STAGES": tiles.stages}


def adapter_variants(R: int, dtype: torch.dtype, backend: str = "cuda") -> Iterator[Variant]:
    """The launches of the adapter's operators on a layer of ``dtype`` at padded rank R, with and without dropout."""
    for name, part, kernel, switches in _launches(R, dtype):
        tiles = default_tiles(part, R, dtype, backend)
        constants = _sizes(tiles) | switches
        yield _variant(name, kernel, constants, R, dtype, backend, tiles.warps, tiles.stages)
        if dtype.itemsize == 2 and "x" in kernel.arg_names:  # in autocast
            tiles = default_tiles(part, R, dtype, backend, True)
            constants, name = _sizes(tiles) | switches, f"{name}, x float32"
            yield _variant(name, kernel, constants, R, dtype, backend, tiles.warps, tiles.stages, wide=True)
    if R == 16:
        yield _variant("sum", sum_kernel, {"ITEMS": SUM_ITEMS}, R, dtype, backend, products=False)
        tile = dict(zip(("ROWS", "COLUMNS"), DROPOUT_TILE, strict=True))
        yield _variant("dropout", dropout_kernel, tile, R, dtype, backend, products=False)


def adapter_candidates(R: int, dtype: torch.dtype, backend: str = "cuda") -> Iterator[Variant]:
    """The same launches at each of the tiles that are measured on the user's GPU beside the default."""
    for name, part, kernel, switches in _launches(R, dtype):
        if part == "core":  # not measured
            continue
        # what differs in the number of programs alone is the same machine code
        for tiles in dict.fromkeys(replace(t, programs=0) for t in candidate_tiles(part, R, dtype, backend)):
            if tiles == replace(default_tiles(part, R, dtype, backend), programs=0):
                continue
            label = f"{name} {tiles.rows}x{tiles.columns} w{tiles.warps} s{tiles.stages}"
            constants = _sizes(tiles) | switches
            yield _variant(label, kernel, constants, R, dtype, backend, tiles.warps, tiles.stages)

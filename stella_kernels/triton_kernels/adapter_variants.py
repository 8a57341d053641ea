"""The adapter's kernels as they are launched at their defaults, beside those of :mod:`.variants`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from .adapter import accumulate_kernel, core_kernel, project_kernel
from .adapter_configuration import (
    DROPOUT_TILE,
    SUM_ITEMS,
    core_precision,
    default_tiles,
    fuses_core,
    joins_core_gradient,
    register_options,
)
from .adapter_gradient import contract_kernel, core_gradient_kernel, spread_kernel, sum_kernel
from .compiled import Variant
from .configuration import arithmetic, precision
from .dropout import dropout_kernel
from .table import element

_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# Rows of activations and both storages of the factors as the layers have them, side by side in memory.
_UNIT_STRIDES = ("x_column", "y_column", "g_column", "u_column", "v_column", "s_column")
_INTEGERS = (
    *("T", "n", "m", "r", "width", "chunk", "splits", "bias_step", "threshold"),
    *("x_row", "y_row", "g_row", "u_row", "v_row", "s_row"),
    *(f"{name}_{factor}" for name in ("size", "chunks") for factor in "UVS"),
)
_ANY = ("splits", "bias_step", "threshold", "chunks_U", "chunks_V", "chunks_S")  # what is no multiple of 16


def _types(dtype: torch.dtype) -> dict[str, str]:
    wide = arithmetic(dtype)
    types = dict.fromkeys(("x", "y", "bias", "grad_x", "grad_y", "A", "P", "K", "out"), _POINTERS[dtype])
    types |= dict.fromkeys(("U", "S", "Vt", "grad_U", "grad_S", "grad_V"), _POINTERS[wide])
    types |= dict.fromkeys(("partials", "partial_Q", "partial_U", "partial_V", "partial_S"), _POINTERS[wide])
    types |= dict.fromkeys(_INTEGERS, "i32") | dict.fromkeys(("scale", "inverse", "beta"), "fp64")
    return types | {"seed": "*i64"}


def adapter_variants(R: int, dtype: torch.dtype, backend: str = "cuda") -> Iterator[Variant]:
    """The launches of the adapter's operators on a layer of ``dtype`` at padded rank R, with and without dropout."""
    TO = element(arithmetic(dtype))
    common = {
        **{"OPERAND": element(dtype), "DOT": element(dtype), "TO": TO, "INDEX": tl.int32, "R": R},
        **{"PRECISION": precision(dtype, backend), "CORE": core_precision(dtype, backend), "DIAGONAL": False},
        **dict.fromkeys(_UNIT_STRIDES, 1),
        **{"DROPS_ALL": False, "QUADS": True, "READ": True, "BIAS": False, "KEEP": True},
    }

    def variant(
        name: str, kernel: Any, constants: dict[str, Any], warps: int, stages: int = 3, products: bool = True
    ) -> Variant:
        used = {key: value for key, value in (common | constants).items() if key in kernel.arg_names}
        divisible = tuple(key for key in kernel.arg_names if key in _INTEGERS and key not in _ANY)
        label = f"adapter {name} {str(dtype).removeprefix('torch.')} R={R}"
        return Variant(
            label,
            kernel,
            used,
            warps,
            products,
            True,
            _types(dtype),
            {"num_stages": stages, **register_options(backend)},
            divisible,
        )

    def streamed(name: str, kernel: Any, part: str, **constants: Any) -> Variant:
        tiles = default_tiles(part, R, dtype)
        sizes = {"ROWS": tiles.rows, "COLUMNS": tiles.columns}
        return variant(name, kernel, {**sizes, **constants}, tiles.warps, tiles.stages)

    needed = dict.fromkeys(("NEED_Q", "NEED_U", "NEED_X", "NEED_V"), True)
    if fuses_core(R, dtype):
        yield streamed("project", project_kernel, "project", SPLIT=False, DROPOUT=False)
    yield streamed("project split dropout", project_kernel, "project", SPLIT=True, DROPOUT=True)
    yield streamed("core", core_kernel, "core")
    yield streamed("accumulate", accumulate_kernel, "accumulate")
    yield streamed("contract", contract_kernel, "contract", **needed)
    both = joins_core_gradient(R)
    yield streamed("core gradient", core_gradient_kernel, "core", NEED_S=True, NEED_K=both)
    yield streamed("spread", spread_kernel, "spread", **needed, DROPOUT=False)
    yield streamed("spread dropout", spread_kernel, "spread", **needed, DROPOUT=True)
    if R == 16:
        yield variant("sum", sum_kernel, {"ITEMS": SUM_ITEMS}, 4, products=False)
        tile = dict(zip(("ROWS", "COLUMNS"), DROPOUT_TILE, strict=True))
        yield variant("dropout", dropout_kernel, tile, 4, products=False)

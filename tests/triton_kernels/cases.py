"""Run the table of cases on Triton's kernels in its interpreter.

``python -m tests.triton_kernels.cases SHARD OF EVERY``.
Of each operator every so-many-th case, of those every OF-th from SHARD on.
A process of its own, since Triton decides when it is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from stella_kernels.operators.signatures import OPERATORS
from stella_kernels.triton_kernels import registration
from stella_kernels.triton_kernels.launch import configuration
from stella_kernels.verification import judge as verification
from stella_kernels.verification.case_table import Case, cases
from tests.triton_kernels import adapter_cases as triton_adapter
from tests.triton_kernels import launches as triton_launches

MAX_RANK, MAX_ROWS = 128, 1100  # of the cases run here: a tile costs milliseconds
MAX_SIDE = 150  # of an adapter's matrices


def round_to_bfloat16() -> None:
    """Triton 3.9's interpreter cuts float32 off to bfloat16, where every chip rounds to the nearest."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            value = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            bits = value.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)
        return cast(self, source, to)

    builder = interpreter.InterpreterBuilder
    builder.cast_impl = rounding
    builder.create_fp_trunc = lambda self, source, to: self.cast_impl(source, to)


def small_tiles(case: Case) -> Callable[..., configuration.Tiles]:
    """Tiles and chunks that every factor has several of, the last of them in part: each mask is crossed."""
    tallest = max((shape[-2] for shape in case.shapes), default=1)
    block = 16
    while 6 * block < tallest and block < 1024:
        block *= 2
    defaults = configuration.tiles_for

    def tiles(R: int, dtype: torch.dtype) -> configuration.Tiles:
        part = 16 if R <= 32 else R // 2
        return replace(
            defaults(R, dtype),
            block=block,
            long_block=block,
            chunk=2 * block,
            rows64=block,
            items=2,
            small=part,
            small64=part,
        )

    return tiles


def permute_programs() -> None:
    """Programs run in an order of their own in every launch, as on a GPU: none may lean on another of its launch."""
    builder = interpreter.InterpreterBuilder
    set_dimension, set_index = builder.set_grid_dim, builder.set_grid_idx
    generator = np.random.default_rng(5)
    order = [0]

    def dimension(self: Any, x: int, y: int, z: int) -> None:
        order[:] = generator.permutation(x).tolist()
        set_dimension(self, x, y, z)

    builder.set_grid_dim = dimension
    builder.set_grid_idx = lambda self, x, y, z: set_index(self, order[x], y, z)


def chosen() -> list[Case]:
    """A draw from the whole table, by name, and most of the quick part of it."""
    picked = []
    for case in cases():
        if case.operator not in OPERATORS or case.method == "svd":
            continue
        if max(shape[-1] for shape in case.shapes) > MAX_RANK or max(shape[-2] for shape in case.shapes) > MAX_ROWS:
            continue
        draw = zlib.crc32(case.name.encode())
        if case.kind in ("adapter", "mask"):  # cheap, but for the large ones
            if max(case.shapes[0]) <= MAX_SIDE or draw % 6 == 0:
                picked.append(case)
            continue
        long = case.scale > 1.0 or case.kind.startswith(("condition", "rank", "zero", "graded", "scale"))
        often = 4 if long else 2 if len(case.shapes) > 1 else 1  # float64, repeated: seconds a case
        if draw % (often if case.quick else 8 * often) == 0 or (case.shapes[0][-1] > 64 and not long):
            picked.append(case)
    return picked


def thinned(chosen: list[Case], every: int) -> list[Case]:
    """Every so-many-th of each operator."""
    return [case for name in OPERATORS for case in [c for c in chosen if c.operator == name][::every]]


def main(shard: int, of: int, every: int) -> None:
    """One line of JSON a case or check: its name, what was compared, error, tolerance; then one a kind of launch."""
    torch.set_num_threads(1)
    triton_launches.record()
    round_to_bfloat16()
    permute_programs()
    operators = registration.operators()
    own = configuration.tiles_for
    triton_adapter.use_small_tiles()
    for case in thinned(chosen(), every)[shard::of]:
        configuration.tiles_for = small_tiles(case)
        result = verification.check(case, "triton", operators)
        configuration.tiles_for = own
        line = {"case": case.name, "what": result.what, "error": result.error, "tolerance": result.tolerance}
        print(json.dumps(line), flush=True)
    for check in triton_adapter.CHECKS[shard::of]:
        torch.manual_seed(0)
        for name, what, error, tolerance in check():
            line = {"case": f"{check.__name__}-{name}", "what": what, "error": error, "tolerance": tolerance}
            print(json.dumps(line), flush=True)
    for launch in triton_launches.launches.values():
        print(json.dumps({"launch": launch}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))

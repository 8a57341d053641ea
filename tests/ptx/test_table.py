"""The table of cases on compiled kernels: right, within bounds, without races, whatever PTX leaves open."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

from stella_kernels.verification.case_table import Case, cases
from stella_kernels.verification.judge import check
from tests.ptx import emulator

pytest.importorskip("triton")

MAX_RANK = 128  # above it the reference serves
SLICE = bool(os.environ.get("STELLA_PTX_SLICE"))  # what compiles in a few minutes
SHARD, SHARDS = (int(part) for part in os.environ.get("STELLA_PTX_SHARD", "0/1").split("/"))


def quickly(case: Case) -> bool:
    """One padded rank; of the Stiefel operators float32 alone, and their solve, which takes long to compile, once."""
    narrow = max(shape[-1] for shape in case.shapes) <= 16
    dtypes = (torch.float32, torch.bfloat16) if case.kind in ("adapter", "mask") else (torch.float32,)
    solved_once = case.operator not in ("project_retract_", "stella_adamw_") or len(case.shapes) > 1
    return case.quick and solved_once and narrow and case.dtype in dtypes and max(case.shapes[0]) < 3000


def emulated() -> list[Case]:
    """What kernels take; of a shard its part, cases of one kernel together, for each is compiled once."""
    mine = []
    for case in cases():
        kernel = f"{case.operator} {case.dtype} {case.shapes[0][-1]} {case.storage}"
        taken = case.method != "svd" and max(shape[-1] for shape in case.shapes) <= MAX_RANK
        if taken and (quickly(case) or not SLICE) and zlib.crc32(kernel.encode()) % SHARDS == SHARD:
            mine.append(case)
    return mine


@pytest.mark.parametrize("case", emulated(), ids=lambda case: case.name)
def test_table_of_cases(case: Case) -> None:
    operators = emulator.operators()
    with emulator.unkind(emulator.EVERYTHING, seed=zlib.crc32(case.name.encode())):
        result = check(case, "ptx", operators)
    assert result.passed, f"{result.what}: error {result.error:.2e}, tolerance {result.tolerance:.2e}"

"""The table of cases of ``python -m stella_kernels verify`` on the device, by operator in turn, as far as time goes.

What is not finite or out of bounds may take the device from this process: another then goes on behind that case.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from itertools import chain, zip_longest
from typing import Any

import torch

from bench.gpu.setting import Setting, lost, read_records
from stella_kernels.operators.signatures import OPERATORS
from stella_kernels.triton_kernels import registration
from stella_kernels.verification.case_data import Implementation
from stella_kernels.verification.case_table import Case, cases
from stella_kernels.verification.judge import check
from stella_kernels.verification.on_device import on

TOY_SIDE, TOY_RANK, TOY_CASES = 70, 16, {"verify": 9, "rest": 3}  # of a rehearsal


def run(setting: Setting) -> None:
    """The quick cases, or the rest of them in the stage of that name."""
    chosen = chosen_cases(setting.rehearse, setting.stage)
    implementation = implementation_of(setting)
    setting.record("table", cases=len(cases()))
    for index, case in enumerate(chosen[setting.start :], setting.start):
        if setting.left < 0:
            setting.missing(f"{len(chosen) - index} of {len(chosen)} cases of the table: no time left")
            break
        result = check(case, "triton", implementation)
        setting.record(
            "case", operator=case.operator, dtype=str(case.dtype).removeprefix("torch."), name=case.name,
            what=result.what[:300], error=result.error, tolerance=result.tolerance, passed=result.passed,
        )  # fmt: skip
        if not result.passed:
            print(f"MISS {case.name}: {result.what[:300]}: {result.error:.2e} of {result.tolerance:.2e}", flush=True)
        if lost(result.what):
            _go_on(setting, index + 1)
    _judge(setting)


def _judge(setting: Setting) -> None:
    """Of every case on record, also of processes that were lost."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_records(setting.folder, setting.stage):
        if record["kind"] == "case":
            found[record["operator"]].append(record)
    for operator, some in found.items():
        missed = [record["name"] for record in some if not record["passed"]]
        names = f": missed {', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}" if missed else ""
        setting.verdict(
            not missed, f"{operator}: {len(some) - len(missed)} of {len(some)} cases within tolerance{names}"
        )


def implementation_of(setting: Setting) -> Implementation:
    """Triton's operators for tensors of the CPU: on the GPU, or interpreted."""
    if setting.rehearse:
        return {name: getattr(torch.ops.stella_kernels, name) for name in OPERATORS}
    return {name: on(str(setting.device), call) for name, call in registration.operators().items()}


def chosen_cases(rehearse: bool, stage: str) -> list[Case]:
    """Operators in turn, so that each has some whenever time ends."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases():
        if case.quick != (stage == "rest") and (not rehearse or _toy(case)):
            groups[case.operator].append(case)
    taken = [case for case in chain(*zip_longest(*groups.values())) if case is not None]
    return taken[: TOY_CASES[stage]] if rehearse else taken


def _toy(case: Case) -> bool:
    """Small, and of a dtype that the interpreter rounds as a chip does."""
    small = max(max(shape, default=0) for shape in case.shapes) <= TOY_SIDE and len(case.shapes) <= 4
    small = small and (case.kind == "mask" or max(shape[-1] for shape in case.shapes) <= TOY_RANK)
    return small and case.dtype in (torch.float32, torch.float16)


def _go_on(setting: Setting, start: int) -> None:
    """This very process anew, behind the case that it was lost in."""
    setting.note(f"the device was lost to this process at case {start}; another goes on behind it")
    if setting.left < 10:
        sys.exit(1)
    command = [sys.executable, "-m", "bench.gpu", setting.stage, str(setting.folder)]
    os.execv(sys.executable, [*command, "--limit", f"{setting.left:.1f}", "--start", str(start)])

"""One layer with its adapter, forward and backward, in the rows of ``python -m bench adapter``."""

from __future__ import annotations

import torch

from bench.adapter import layer
from bench.adapter.layer import LARGE, SMALL, Case
from bench.adapter.lora import lora_is
from bench.gpu.setting import Setting, attempt

HALF = torch.bfloat16
CASES = (
    Case(4096, *LARGE, 16, 0.0, HALF),
    Case(4096, *LARGE, 16, 0.05, HALF),
    Case(8192, *SMALL, 16, 0.05, HALF),
    Case(4096, *LARGE, 64, 0.05, HALF),
    Case(4096, 14336, 4096, 16, 0.0, HALF),
    Case(512, *SMALL, 16, 0.0, HALF),  # a few rows: what the host takes counts
    Case(4096, *LARGE, 16, 0.0),
    Case(4096, *LARGE, 64, 0.0, HALF),
)
TUNED = CASES[:3]  # tuning times some candidates of every kernel
TOY = (Case(20, 12, 16, 4, 0.0), Case(20, 12, 16, 4, 0.5))


def run(setting: Setting) -> None:
    """A row for each case that there is time for."""
    device = setting.device
    tuned = setting.stage == "tuned"
    cases = (TOY[:1] if tuned else TOY) if setting.rehearse else TUNED if tuned else CASES
    setting.note(f"LoRA is {lora_is()}")
    print(layer.HEADER, flush=True)
    for index, case in enumerate(cases):
        if setting.left < 4:
            setting.missing(f"{len(cases) - index} of {len(cases)} layers: no time left")
            break
        seconds = min(3.0, setting.left / (len(cases) - index))
        row = attempt(setting, case.name, lambda case=case, s=seconds: layer.measure(case, s, device))
        if row is None:
            continue
        print(layer.table_row(row), flush=True)
        setting.record("layer", name=case.name, floor_bytes=floor_bytes(case), **row.as_dict())


def floor_bytes(case: Case) -> int:
    """That the adapter must move beyond its base's products: x twice, y and ∂x read and written, Y' once."""
    return case.dtype.itemsize * case.tokens * (4 * case.n + 3 * case.m)

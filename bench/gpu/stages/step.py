"""The optimizer step of a Llama-3-8B's factors, in the rows of ``python -m bench step``; and project-and-retract."""

from __future__ import annotations

import torch

from bench.common import shapes
from bench.common.shapes import LLAMA_3_8B
from bench.gpu.setting import Setting, attempt
from bench.stiefel import retract, step

RANKS = (16, 64, 8, 32, 128)


def run(setting: Setting) -> None:
    """Two rows a rank."""
    device = setting.device
    if device.type == "cuda":
        shrink_to_memory(torch.cuda.get_device_properties(device).total_memory)
    ranks = (4,) if setting.rehearse else RANKS
    print(f"{step.FORMULA}\n{step.HEADER}", flush=True)
    for index, r in enumerate(ranks):
        if setting.left < 6:
            setting.missing(f"ranks {', '.join(map(str, ranks[index:]))}: no time left")
            break
        seconds = min(4.0, 0.4 * setting.left / (len(ranks) - index))
        row = attempt(setting, f"step, r = {r}", lambda r=r, s=seconds: step.measure(r, s, False, device))
        if row is not None:
            print(step.table_row(row), flush=True)
            setting.record("step", **row.as_dict())
        other = attempt(setting, f"retract, r = {r}", lambda r=r, s=seconds / 2: retract.measure(r, s, device))
        if other is not None:
            print(f"{retract.HEADER}\n{retract.table_row(other)}", flush=True)
            setting.record("retract", **other.as_dict())


def shrink_to_memory(total: int) -> None:
    """Fewer layers on a GPU that would not hold four optimizers' states and gradients of them all."""
    while shapes.MAX_LAYERS_RANK > 128 and total < shapes.MAX_LAYERS_RANK * LLAMA_3_8B.rows * 4 * 34:
        shapes.MAX_LAYERS_RANK //= 2

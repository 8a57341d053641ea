"""The bytes that the Stiefel kernels load and store for one factor, counted in Triton's interpreter on the CPU.

Of this checkout and no matter which GPU. A program reads and writes its own factor alone, so that those of a model are
so many times as many; ``python -m bench traffic`` counts all of its shapes, and the adapter, in some minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.setting import Setting, attempt, importable
from bench.traffic.counting import counting
from bench.traffic.stiefel import adamw_arguments
from stella_kernels.triton_kernels.registration import interpreted, operators

ROWS, TOY_ROWS = 4096, 64  # of a factor
RANKS = (16, 64)


def run(setting: Setting) -> None:
    """Words of four bytes an element of each operator and rank that there is time for."""
    if why_not := importable("numpy") or ("" if interpreted() else "Triton is not installed"):
        setting.missing(f"counted bytes: {why_not}, and its interpreter needs it")
        return
    torch.set_num_threads(1)
    n = TOY_ROWS if setting.rehearse else ROWS
    for r in RANKS[:1] if setting.rehearse else RANKS:
        for name, call in _calls(n, r).items():
            if setting.left < 0:
                setting.missing(f"counted bytes of {name} at r = {r}: no time left")
                continue
            attempt(setting, f"{name}, r = {r}", lambda name=name, call=call, r=r: _count(setting, name, n, r, call))


def _calls(n: int, r: int) -> dict[str, Callable[[], object]]:
    Y = torch.linalg.qr(torch.randn(n, r)).Q.contiguous()
    moved: Tensor = Y + 1e-3 * torch.randn(n, r)
    return {
        "stella_adamw_": lambda: operators()["stella_adamw_"](*adamw_arguments(n, r, False, False)),
        "project_retract_": lambda: operators()["project_retract_"]([moved], [Y], [1.0], "auto"),
        "polar": lambda: operators()["polar"](moved[None].contiguous(), "auto"),
    }


def _count(setting: Setting, name: str, n: int, r: int, call: Callable[[], object]) -> None:
    with counting() as moved:
        call()
    words, launches = moved.bytes / (4 * n * r), sum(moved.launches.values())
    setting.record("count", operator=name, n=n, r=r, words=words, launches=launches)
    print(f"{name:<18} n = {n}, r = {r}: {words:.2f} words an element, {launches} launches", flush=True)

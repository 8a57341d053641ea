"""The polar factor of batches of a Llama-3-8B's shapes, in the rows of ``python -m bench polar``."""

from __future__ import annotations

from bench.common.shapes import Case
from bench.common.timing import measure_machine
from bench.gpu.setting import Setting, attempt
from bench.stiefel import polar

CASES = tuple(Case(batch, n, r, ("Llama-3-8B",)) for n, r, batch in (
    (4096, 16, 64), (4096, 64, 32), (14336, 16, 32), (4096, 8, 64), (4096, 32, 64), (4096, 128, 16),
))  # fmt: skip
TOY = (Case(3, 40, 4, ("toy",)),)


def run(setting: Setting) -> None:
    """A row for each case that there is time for."""
    device = setting.device
    machine = measure_machine(device)
    print(polar.HEADER, flush=True)
    cases = TOY if setting.rehearse else CASES
    for index, case in enumerate(cases):
        if setting.left < 4:
            setting.missing(f"{len(cases) - index} of {len(cases)} polar factors: no time left")
            break
        seconds = min(2.0, 0.5 * setting.left / (len(cases) - index))
        name = f"polar {case.batch} × {case.n} × {case.r}"
        row = attempt(setting, name, lambda case=case, s=seconds: polar.measure(case, machine, s, device))
        if row is not None:
            print(polar.table_row(row), flush=True)
            setting.record("polar", copy_bandwidth=machine.bandwidth, **row.as_dict())

"""Every barrier of the kernels removed, one at a time: it is reported, or it was not needed and changes nothing."""

from __future__ import annotations

import pytest
import torch

from tests.ptx import emulator
from tests.ptx.calls import CALLS

pytest.importorskip("triton")


SLOW = ("project_retract_", "stella_adamw_")  # to compile


@pytest.mark.parametrize("operator", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CALLS])
def test_each_barrier_removed(operator: str) -> None:
    with emulator.unkind(emulator.RACES):  # no noise: the same bits in every order of warps
        wanted, launches = emulator.observed(CALLS[operator])
        kernels = {launch.function: launch for launch in launches}
        passed = sum(launch.barriers for launch in launches)
        reported = silent = unreached = 0
        for function, launch in kernels.items():
            for which in range(launch.static_barriers):
                with emulator.without_barrier(function, which):
                    try:
                        found, fewer = emulator.observed(CALLS[operator])
                    except RuntimeError as error:
                        if "races:" not in str(error):
                            raise
                        reported += 1
                        continue
                if sum(launch.barriers for launch in fewer) == passed:
                    unreached += 1
                else:
                    silent += 1
                same = all(torch.equal(now, before) for now, before in zip(found, wanted, strict=True))
                assert same, f"barrier {which} of {launch.kernel}: unreported, and results changed"
    print(f"{operator}: {reported} barriers reported, {silent} that change nothing, {unreached} that nothing comes to")
    assert reported > silent, "a detector that misses most would pass"


def test_what_a_call_issues_is_counted() -> None:
    """Of ``issue time``: warps' instructions, barriers, and bytes."""
    launches = emulator.observed(CALLS["adapter_forward_"])[1]
    assert [launch.kernel for launch in launches][-1] == "accumulate_kernel"
    for launch in launches:
        assert launch.instructions > 100 * launch.warps
        assert launch.bytes_read > 0
        assert launch.bytes_written > 0
    x, y = 150 * 136 * 2, 150 * 72 * 2
    assert sum(launch.bytes_read for launch in launches) >= x + y
    assert launches[-1].bytes_written == y

"""Every kernel compiles ahead of time on whatever Triton is installed: ``make test-oldest-triton`` asks the oldest."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

# By place in the list of kernels: each is compiled for one of them.
NAMES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_compiles_for_one_chip(name: str) -> None:
    from stella_kernels.triton_kernels.report.compiled import CHIPS, compile_for
    from stella_kernels.triton_kernels.report.variants import variants

    chip = CHIPS[name]
    # The solves of a retraction hold that of a polar factor, and take minutes.
    quick = [
        v for v in variants((16,), chip.target.backend, chip.target.arch) if "solve" not in v.name or "polar" in v.name
    ]
    mine = quick[NAMES.index(name) :: len(NAMES)]
    assert len(mine) >= 5
    for variant in mine:
        resources = compile_for(variant, chip)
        assert resources.registers > 0
        assert resources.shared <= chip.block_shared

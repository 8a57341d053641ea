"""The phases of a step on some rows of each factor, on Triton's kernels in its interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.triton_kernels import launches as triton_launches

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    """What tests/triton_kernels/phase_cases.py prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_kernels.phase_cases"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_phases_in_the_interpreter(interpreted: list[dict[str, Any]]) -> None:
    lines = [line for line in interpreted if "case" in line]
    missed = [line for line in lines if not line["error"] <= line["tolerance"]]  # NaN does not pass
    assert not missed, "\n".join(
        f"{line['case']}: {line['what']}: error {line['error']:.2e}, tolerance {line['tolerance']:.2e}"
        for line in missed
    )
    cases = {line["case"].split()[0] for line in lines}
    assert cases == {"fused", "separate", "long", "gradients", "nothing", "refusals", "launches"}


@pytest.mark.pinned_triton
@pytest.mark.slow
def test_every_launch_of_the_phases_has_the_types_that_a_chip_takes(interpreted: list[dict[str, Any]]) -> None:
    launches = {json.dumps(line["launch"], sort_keys=True): line["launch"] for line in interpreted if "launch" in line}
    failed = []
    for launch in launches.values():
        try:
            triton_launches.build(launch, 90)
        except Exception as error:  # of any kind that Triton has
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            failed.append(f"{launch['kernel']} {launch['constants']}: {error}")
    assert not failed, "\n".join(failed)
    kernels = {launch["kernel"].split(":")[1] for launch in launches.values()}
    assert {"pack_kernel", "unpack_kernel", "coupling_kernel", "gram_kernel", "solve_kernel"} <= kernels

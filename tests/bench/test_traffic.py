"""What the traffic benchmark counts is what is moved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

CODE = """
import json, torch, triton, triton.language as tl
from bench.traffic.counting import counting
from bench.traffic.stiefel import adamw_arguments
from stella_kernels.triton_kernels.registration import operators

@triton.jit
def copy(source, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)

torch.manual_seed(0)
source = torch.randn(37)
with counting() as copied:
    copy[(3,)](source, torch.empty(37), 37, BLOCK=16)
moved = []
for n in (512, 1024):
    with counting() as step:
        operators()["stella_adamw_"](*adamw_arguments(n, 16, True, False))
    solve = step.loaded["solve_kernel"] + step.stored["solve_kernel"]
    moved.append([step.bytes - solve, sum(step.launches.values())])
print(json.dumps([copied.loaded, copied.stored, copied.launches, moved]))
"""


def test_counts_are_the_bytes_that_are_moved() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    loaded, stored, launches, moved = json.loads(done.stdout)
    assert loaded == stored == {"copy": 4 * 37}
    assert launches == {"copy": 1}
    # Twice the rows: twice 12 words an element, and of Gram blocks (one of 512 rows) at most a hundredth of that again.
    # Without the solve, which knows no rows and takes an iteration more where the data would have it.
    (few, some), (many, more) = moved
    words = (many - few) / (4 * 512 * 16)
    assert 12.0 <= words <= 12.12
    assert some == more == 5


MODEL = """
import json, torch
from bench.traffic import stiefel as traffic
from bench.common.shapes import ModelShapes
traffic.LLAMA_3_8B, traffic.LAYERS = ModelShapes("small", hidden=4096, mlp=8192, key_value=4096), 2
traffic.heights = lambda: {(4096, False): 2, (8192, True): 2}
torch.manual_seed(0)
rows = []
for r in (16, 64):
    published, operations = traffic.published_step(r)
    moved = traffic.stiefel_step(r, True)
    words = 4 * 2 * 2 * (4096 + 8192) * r
    rows.append([moved.bytes / words, sum(moved.launches.values()), sum(published.values()) / words,
                 operations["_linalg_svd"], sum(operations.values())])
print(json.dumps(rows))
"""


@pytest.mark.whole
def test_a_step_keeps_to_the_floor_and_the_published_one_does_not() -> None:
    from bench.traffic.stiefel import FLOOR_WORDS, WANTED_LAUNCHES, WANTED_OF_FLOOR

    done = subprocess.run(
        [sys.executable, "-c", MODEL],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    floor = FLOOR_WORDS["coupling given"]
    for r, (words, launches, published, svds, operations) in zip((16, 64), json.loads(done.stdout), strict=True):
        # The r x r algebra in its workspace, which stays in a cache, is counted: a tenth of all at r = 64.
        assert floor <= words <= (WANTED_OF_FLOOR if r == 16 else 1.25) * floor
        assert launches <= WANTED_LAUNCHES
        # Five times our bytes at r = 16; at r = 64 the workspace takes 7 to 12 % of ours: more where the solve of one
        # of these few factors takes one iteration more, on which round-off decides.
        assert published >= (5.0 if r == 16 else 4.4) * words
        assert svds == 2  # a batched one for each shape
        assert operations >= 10 * svds


def test_operations_count_what_they_read_and_write() -> None:
    from bench.traffic.counting import Operations

    a, b = torch.randn(8, 4), torch.randn(8, 4)
    with Operations() as operations:
        a.mT.add_(b.mT)  # views move nothing; reads a and b, writes a
        torch._foreach_mul_([a, b], 2.0)  # reads and writes both
    assert operations.bytes == {"add_": 3 * 4 * 32, "_foreach_mul_": 4 * 4 * 32}
    with Operations() as operations:
        torch.linalg.svd(a, full_matrices=False)  # reads (8, 4), writes it, (4,) and (4, 4); copies (8, 4) before
    assert operations.bytes == {"_linalg_svd": 4 * (2 * 32 + 4 + 16), "copy for cuSOLVER": 2 * 4 * 32}

"""The same candidates as pytest-benchmark cases, for comparing two versions of the kernel:

pytest bench/test_polar_benchmark.py --benchmark-autosave
"""

from __future__ import annotations

import pytest
import torch

from bench.stiefel import compositions
from bench.stiefel.polar import relative_error, retraction_input
from stella_kernels.functional import polar

CANDIDATES = {"native": polar, "qr": compositions.qr, **compositions.POLAR}


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize(("batch", "n", "r"), [(64, 4096, 8), (64, 4096, 32), (16, 4096, 128), (16, 14336, 16)])
def test_polar(benchmark, name: str, batch: int, n: int, r: int) -> None:
    M = retraction_input(batch, n, r)
    benchmark.group = f"{batch} × {n} × {r}"
    Q = benchmark(CANDIDATES[name], M)
    if name == "native":
        exact = compositions.svd(M[:1].double())
        # Both factors of Q = M R carry round-off of float32, 6e-8, over sums of at most 14336 terms added in blocks.
        assert relative_error(Q[:1], exact) < 100 * torch.finfo(torch.float32).eps

"""Where the tests of this folder run: on a GPU, and on the CPU, whose tensors Triton's interpreter serves if asked."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import rehearsal

rehearsal.serve_interpreted()  # under TRITON_INTERPRET=1 and STELLA_KERNELS_BACKEND=reference alone


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device that the operators run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch can use")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU, and the CPU has tests of its own")
    return torch.device(request.param)

"""What ``python -m bench gpu`` asks of kernels beyond single calls: graphs, streams, devices, checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.gpu import features

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", features.CHECKS, ids=lambda check: check.__name__)
def test_feature(check: Callable[[torch.device], features.Compared], device: torch.device) -> None:
    try:
        every = list(check(device))
    except features.NotHereError as reason:
        pytest.skip(str(reason))
    assert every
    missed = [f"{what}: {error:.2e} of {bound:.1e}" for what, error, bound in every if not error <= bound]
    assert not missed, "\n".join(missed)

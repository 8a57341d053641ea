"""The step on factors whose rows are spread over processes: that of one process, by sums of r × r blocks alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.problem import BUILDERS, STEPS, apart, model_of, off, shard, train
from tests.distributed.processes import together


def trained(widths: str, how: str, build: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    model = shard(model_of(widths, dtype), how)
    return train(model, BUILDERS[build](model), 0, STEPS)


@pytest.mark.parametrize(
    ("world", "widths", "how"),
    [
        (2, "even", "rows"),
        (2, "uneven", "rows"),
        (4, "even", "hsdp"),
        (4, "fewer rows than processes", "rows"),
        (2, "even", "default"),
    ],
)
@pytest.mark.parametrize("build", BUILDERS)
def test_sharded_factors_take_the_steps_of_one_process(
    tmp_path: Path, build: str, world: int, widths: str, how: str
) -> None:
    dtype = torch.float32
    found = together(world, tmp_path, trained, widths, how, build, dtype)
    model = model_of(widths, dtype)
    wanted = train(model, BUILDERS[build](model), 0, STEPS)
    for trajectory in found:
        assert apart(trajectory, wanted) < 1e-6
        assert max(map(off, trajectory)) < 1e-6
        assert apart(trajectory, found[0]) == 0.0

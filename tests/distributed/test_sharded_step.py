"""The step on factors whose rows are spread over processes: that of one process, by sums of r × r blocks alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stella_kernels.nn import stiefel_factors
from tests.distributed.problem import BUILDERS, STEPS, apart, batch, model_of, off, shard, train
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


class Collectives(TorchDispatchMode):
    """Names of the collectives inside, and how many elements each takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            sizes = [t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.seen.append((str(func), max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def sent(build: str) -> tuple[list[tuple[str, int]], int]:
    """The collectives of a step, and 4 r² summed over the factors."""
    model = shard(model_of("even"), "rows")
    optimizer = BUILDERS[build](model)
    train(model, optimizer, 0, 1)
    x, target = batch(model, 1)
    (model(x) - target).square().mean().backward()
    with Collectives() as collectives:
        optimizer.step()
    return collectives.seen, sum(4 * f.view.shape[1] ** 2 for f in stiefel_factors(model))


@pytest.mark.parametrize("build", BUILDERS)
def test_a_step_is_two_sums_of_four_words_a_square(tmp_path: Path, build: str) -> None:
    for collectives, most in together(2, tmp_path, sent, build):
        assert len(collectives) == 2
        assert all("allreduce" in name for name, _ in collectives)
        assert sum(size for _, size in collectives) <= most

"""Ways to step the factors of some layers over several processes, from the same start and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bench.common.shapes import LLAMA_3_8B
from bench.stiefel.published import PublishedGeometry
from stella_kernels.nn import StiefelFactor
from stella_kernels.optim import StellaAdamW

RATE = 1e-3
HIDDEN = LLAMA_3_8B.hidden


def shapes(layers: int, r: int) -> list[tuple[int, int]]:
    """(n, r) of every factor of so many layers, U and V in turn."""
    return [(side, r) for _ in range(layers) for pair in LLAMA_3_8B.projections.values() for side in pair]


def whole(layers: int, r: int) -> list[nn.Parameter]:
    """Factors, the same on every process, with a gradient."""
    generator = torch.Generator().manual_seed(0)
    factors = []
    for n, columns in shapes(layers, r):
        factor = nn.Parameter(torch.linalg.qr(torch.randn(n, columns, generator=generator)).Q.contiguous())
        factor.grad = torch.randn(n, columns, generator=generator)
        factors.append(factor)
    return factors


def named(parameters: list[nn.Parameter]) -> list[StiefelFactor]:
    """As the optimizers take them."""
    return [StiefelFactor(p, False, f"factor {i}") for i, p in enumerate(parameters)]


def sharded(layers: int, r: int) -> Callable[[], object]:
    """Ours: rows split over the processes, two sums of r × r blocks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = []
    for p in whole(layers, r):
        split = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        assert p.grad is not None
        split.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        parameters.append(split)
    return StellaAdamW(parameters, RATE, factors=named(parameters), grad_scaling=HIDDEN, weight_decay=0.0).step


def gathered(layers: int, r: int) -> Callable[[], object]:
    """Rows split, and every factor and gradient gathered for the step of one process; each keeps its rows."""
    world, rank = dist.get_world_size(), dist.get_rank()
    parameters = whole(layers, r)
    own: list[tuple[Tensor, Tensor]] = []
    for p in parameters:
        assert p.grad is not None
        own.append((p.detach().chunk(world)[rank].clone(), p.grad.chunk(world)[rank].clone()))
    optimizer = StellaAdamW(parameters, RATE, factors=named(parameters), grad_scaling=HIDDEN, weight_decay=0.0)

    def step() -> None:
        for p, (value, gradient) in zip(parameters, own, strict=True):
            assert p.grad is not None
            dist.all_gather([*p.data.chunk(world)], value)
            dist.all_gather([*p.grad.chunk(world)], gradient)
        optimizer.step()
        for p, (value, _) in zip(parameters, own, strict=True):
            value.copy_(p.detach().chunk(world)[rank])

    return step


def replicated(layers: int, r: int) -> Callable[[], object]:
    """Whole factors on every process, as under DDP: nothing is sent by the step."""
    parameters = whole(layers, r)
    return StellaAdamW(parameters, RATE, factors=named(parameters), grad_scaling=HIDDEN, weight_decay=0.0).step


def published(layers: int, r: int) -> Callable[[], object]:
    """The published hooks around AdamW, on whole factors as under DDP."""
    parameters = whole(layers, r)
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0, fused=True)
    PublishedGeometry(optimizer, named(parameters), HIDDEN)
    return optimizer.step


WAYS: dict[str, Callable[[int, int], Callable[[], object]]] = {
    "sharded": sharded,
    "gathered": gathered,
    "replicated": replicated,
    "published": published,
}

"""A small model with adapters, batches, and its training on one process or on several, sharded."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer

from stella_kernels import StellaLinear
from stella_kernels.distributed import shard_placement
from stella_kernels.optim import StellaAdamW, attach

STEPS = 10
RANK = 5
WIDTHS = {"even": (24, 32, 16), "uneven": (13, 21, 17), "fewer rows than processes": (24, 6, 8)}


class Model(nn.Module):
    def __init__(self, widths: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        n, hidden, m = widths
        self.config = SimpleNamespace(hidden_size=hidden)
        self.first = StellaLinear(nn.Linear(n, hidden, dtype=dtype).requires_grad_(False), r=RANK)
        self.second = StellaLinear(nn.Linear(hidden, m, dtype=dtype).requires_grad_(False), r=RANK)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def model_of(widths: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(WIDTHS[widths], dtype)


def batch(model: Any, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    n, m, dtype = model.first.base.in_features, model.second.base.out_features, model.first.U.dtype
    return torch.randn(12, n, generator=generator, dtype=dtype), torch.randn(12, m, generator=generator, dtype=dtype)


def shard(model: Any, how: str) -> Any:
    """'rows' by shard_placement; 'default' without it; 'hsdp' over a mesh of two dimensions."""
    world = dist.get_world_size()
    if how == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        place: Any = shard_placement(model, world // 2)
    else:
        mesh = init_device_mesh("cpu", (world,))
        place = None if how == "default" else shard_placement(model)
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh)


def fused(model: nn.Module) -> Optimizer:
    return StellaAdamW(model, lr=1e-2, weight_decay=0.0)


def attached(model: nn.Module) -> Optimizer:
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    attach(optimizer, model)
    return optimizer


BUILDERS: dict[str, Callable[[nn.Module], Optimizer]] = {"fused": fused, "attach": attached}


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> list[dict[str, Tensor]]:
    """The trained tensors, whole, after each step; the same batch on all processes."""
    trajectory = []
    for step in range(first, last):
        optimizer.zero_grad()
        x, target = batch(model, step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        trajectory.append(whole(model))
    return trajectory


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}


def full(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def apart(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> float:
    """The largest relative difference of a tensor at a step."""
    assert len(one) == len(other)
    return max(
        float((a[name] - b[name]).norm() / b[name].norm()) for a, b in zip(one, other, strict=True) for name in b
    )


def off(tensors: dict[str, Tensor]) -> float:
    """The largest ``‖QᵀQ − I‖`` of a factor."""
    worst = 0.0
    for name, value in tensors.items():
        if name.endswith("S"):
            continue
        Y = (value if name.endswith("U") else value.mT).double()
        worst = max(worst, float((Y.mT @ Y - torch.eye(Y.shape[1], dtype=Y.dtype)).norm()))
    return worst

"""Adapters over two processes (gloo): data parallel, and bases whose weight is sharded over a mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from stella_kernels import StellaLinear
from tests.distributed.processes import together

WORLD, T, N, M, R = 2, 6, 12, 8, 3
# float64: sums of at most 12 terms, perhaps in another order, in three products: 1e-13 is 450 roundings
EXACT = 1e-13


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found.detach() - wanted.detach()).norm()) <= EXACT * float(wanted.detach().norm())


def layer(base: nn.Module) -> StellaLinear:
    result = StellaLinear(base, r=R, alpha=2 * R, dtype=torch.float64)
    nn.init.normal_(result.S)
    return result


def gradients(model: nn.Module, x: Tensor, grad_y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = model(x)
    return y, *torch.autograd.grad(y, [x, *leaves], grad_y)


def data_parallel(rank: int) -> None:
    """Each process sees half of the batch; the gradients are those of the whole, and so is the step."""
    model = nn.Sequential(layer(nn.Linear(N, M, dtype=torch.float64)), nn.Tanh(), layer(nn.Linear(M, N).double()))
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(T, N, dtype=torch.float64)
    wanted = torch.autograd.grad(model(x).square().mean(), trained)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    parallel(x.chunk(WORLD)[rank]).square().mean().backward()
    for p, gradient in zip(trained, wanted, strict=True):
        assert p.grad is not None
        assert_same(p.grad, gradient)
    torch.optim.AdamW(trained).step()
    for p in trained:
        everywhere = [torch.empty_like(p) for _ in range(WORLD)]
        dist.all_gather(everywhere, p.detach())
        assert all(torch.equal(other, p) for other in everywhere)


def sharded_base(rank: int) -> None:
    """The weight is a DTensor, the output is gathered: the adapter's base is opaque, and nothing else changes."""
    mesh = init_device_mesh("cpu", (WORLD,))
    plans = (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate()))
    for plan in plans:
        whole = nn.Linear(N, M, dtype=torch.float64)
        base = parallelize_module(copy.deepcopy(whole), mesh, plan)
        assert base.weight.to_local().shape != whole.weight.shape
        model = layer(base)
        plain = layer(whole)
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "base" not in k}, strict=False)
        x, grad_y = torch.randn(2, T, N, dtype=torch.float64), torch.randn(2, T, M, dtype=torch.float64)
        found = gradients(model, x, grad_y, [model.U, model.S, model.Vt])
        wanted = gradients(plain, x, grad_y, [plain.U, plain.S, plain.Vt])
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)


class ColumnShard(nn.Module):
    """A process's share of a layer's outputs: ``out_features`` is its own, not the whole layer's."""

    def __init__(self, whole: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features // WORLD
        self.weight = nn.Parameter(whole.weight.detach().chunk(WORLD)[rank].clone())
        self.bias = nn.Parameter(whole.bias.detach().chunk(WORLD)[rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def adapter_of_a_shard(rank: int) -> None:
    """Each process adapts its own outputs by its rows of U; S and V are replicated, their gradients summed."""
    whole = nn.Linear(N, M, dtype=torch.float64)
    plain = layer(whole)
    model = StellaLinear(ColumnShard(whole, rank), r=R, alpha=2 * R, dtype=torch.float64)
    with torch.no_grad():
        for own, source in ((model.U, plain.U.chunk(WORLD)[rank]), (model.S, plain.S), (model.Vt, plain.Vt)):
            own.copy_(source)
    x, grad_y = torch.randn(T, N, dtype=torch.float64), torch.randn(T, M, dtype=torch.float64)
    wanted = gradients(plain, x, grad_y, [plain.U, plain.S, plain.Vt])
    mine = gradients(model, x, grad_y.chunk(WORLD, 1)[rank], [model.U, model.S, model.Vt])
    y, grad_x, grad_U, grad_S, grad_Vt = (t.detach() for t in mine)
    for partial in (grad_x, grad_S, grad_Vt):
        dist.all_reduce(partial)
    assert_same(y, wanted[0].chunk(WORLD, 1)[rank])
    assert_same(grad_U, wanted[2].chunk(WORLD)[rank])
    for found, value in zip((grad_x, grad_S, grad_Vt), (wanted[1], wanted[3], wanted[4]), strict=True):
        assert_same(found, value)


def _task(task: Callable[[int], None]) -> None:
    torch.manual_seed(7)  # one model and one batch everywhere
    task(dist.get_rank())


@pytest.mark.parametrize("task", [data_parallel, sharded_base, adapter_of_a_shard])
def test_two_processes(task: Callable[[int], None], tmp_path: Path) -> None:
    together(WORLD, tmp_path, _task, task)

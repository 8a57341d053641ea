"""Each kernel of the optimizer step as a pytest-benchmark case, for comparing two versions of it:

pytest bench/test_step_benchmark.py --benchmark-autosave
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.stiefel.model import LEARNING_RATE, llama_factors
from bench.stiefel.polar import STEP_NORM

kernels = torch.ops.stella_kernels
SIZES = pytest.mark.parametrize(("layers", "r"), [(8, 8), (4, 16), (2, 32), (1, 64)])

# 64 unit round-offs, times sqrt(r): past that the native kernel takes a more careful path.
RESIDUAL = 32 * torch.finfo(torch.float32).eps


def tensors(layers: int, r: int) -> tuple[list[Tensor], list[Tensor]]:
    """Factors and gradients of so many layers of a Llama-3-8B, (n, r) views of both storages."""
    factors = llama_factors(layers, r, torch.Generator().manual_seed(r))
    gradients = [f.parameter.grad.mT if f.transposed else f.parameter.grad for f in factors]
    return [f.view for f in factors], gradients


def worst_residual(info: Tensor, r: int) -> float:
    assert not info[:, 0].any()
    return float(info[:, 1].max()) / r**0.5


@SIZES
def test_riemannian_gradient(benchmark, layers: int, r: int) -> None:
    factors, gradients = tensors(layers, r)
    work, snapshots = [torch.empty_like(g) for g in gradients], [torch.empty_like(Y) for Y in factors]
    benchmark.group = f"riemannian_gradient_, {layers} layers, r = {r}"

    def setup() -> tuple[tuple[list[Tensor], list[Tensor], list[Tensor]], dict[str, object]]:
        torch._foreach_copy_(work, gradients)
        return (work, factors, snapshots), {}

    info = benchmark.pedantic(kernels.riemannian_gradient_, setup=setup, rounds=15, warmup_rounds=1)
    assert not info[:, 0].any()


@SIZES
def test_project_retract(benchmark, layers: int, r: int) -> None:
    factors, gradients = tensors(layers, r)
    moved = [Y + g * (STEP_NORM / torch.linalg.matrix_norm(g)) for Y, g in zip(factors, gradients, strict=True)]
    work = [torch.empty_like(M) for M in moved]
    benchmark.group = f"project_retract_, {layers} layers, r = {r}"

    def setup() -> tuple[tuple[list[Tensor], list[Tensor], list[float], str], dict[str, object]]:
        torch._foreach_copy_(work, moved)
        return (work, factors, [1.3] * len(work), "auto"), {}

    info = benchmark.pedantic(kernels.project_retract_, setup=setup, rounds=15, warmup_rounds=1)
    assert worst_residual(info, r) < RESIDUAL


@SIZES
@pytest.mark.parametrize("coupled", [False, True])
def test_stella_adamw(benchmark, layers: int, r: int, coupled: bool) -> None:
    factors, gradients = tensors(layers, r)
    first, second = [torch.zeros_like(Y) for Y in factors], [torch.ones_like(Y) for Y in factors]
    couplings = [g.mT @ Y if coupled else Y.new_empty(0) for g, Y in zip(gradients, factors, strict=True)]
    row = [LEARNING_RATE, 0.9, 0.999, 1e-8, 1000.0, 1.3, 1.0]
    hyperparameters = torch.tensor([row] * len(factors), dtype=torch.float64)
    benchmark.group = f"stella_adamw_, {layers} layers, r = {r}"
    info = benchmark.pedantic(
        kernels.stella_adamw_,
        args=(factors, gradients, first, second, couplings, hyperparameters),
        rounds=15,
        warmup_rounds=1,
    )
    assert worst_residual(info, r) < RESIDUAL

"""One call of each operator on a little data, of a kind that reaches most of its kernels' code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.ptx import emulator

Call = Callable[[], list[Tensor]]  # on fresh copies of the same data: what it returns and what it wrote


def _polar() -> list[Tensor]:
    return list(emulator.operators()["polar"](_data(67, 12), "auto"))


def _data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def _factors() -> list[Tensor]:
    return [torch.linalg.qr(_data(n, r)).Q.contiguous() for n, r in ((2100, 12), (37, 5))]


def _gradient() -> list[Tensor]:
    factors = _factors()
    gradients = [_data(*Y.shape, seed=1) for Y in factors]
    return [emulator.operators()["riemannian_gradient_"](gradients, factors, []), *gradients]


def _retract() -> list[Tensor]:
    factors = _factors()
    moved = [Y + 0.1 * _data(*Y.shape, seed=2) for Y in factors]
    return [emulator.operators()["project_retract_"](moved, factors, [1.0, 1.0], "auto"), *moved]


def _adamw() -> list[Tensor]:
    factors = _factors()
    gradients = [_data(*Y.shape, seed=1) for Y in factors]
    first, second = [torch.zeros_like(Y) for Y in factors], [torch.zeros_like(Y) for Y in factors]
    rows = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 1.0, 1.0, 1.0]] * 2, dtype=torch.float64)
    couplings = [torch.empty(0) for _ in factors]
    info = emulator.operators()["stella_adamw_"](factors, gradients, first, second, couplings, rows)
    return [info, *factors, *first, *second]


def _layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, m, n, r = 150, 72, 136, 12
    return _data(T, n, dtype=dtype), _data(T, m, dtype=dtype), _data(m, r), _data(r, r), _data(r, n)


def _adapter_forward(dtype: torch.dtype) -> list[Tensor]:
    x, y, U, S, Vt = _layer(dtype)
    return [emulator.operators()["adapter_forward_"](y, x, U, S, Vt, 1.3, 0.25, torch.tensor(7)), y]


def _adapter_backward(dtype: torch.dtype) -> list[Tensor]:
    x, grad_y, U, S, Vt = _layer(dtype)
    A, grad_x = _data(x.shape[0], U.shape[1], dtype=dtype), torch.zeros_like(x)
    arguments = (grad_x, 0.0, grad_y, x, A, U, S, Vt, 1.3, 0.25, torch.tensor(7), [True] * 3)
    return [*emulator.operators()["adapter_backward_"](*arguments), grad_x]


CALLS: dict[str, Call] = {
    "polar": _polar,
    "riemannian_gradient_": _gradient,
    "project_retract_": _retract,
    "stella_adamw_": _adamw,
    "adapter_forward_": partial(_adapter_forward, torch.bfloat16),
    "adapter_backward_": partial(_adapter_backward, torch.bfloat16),
    "adapter_backward_ of float32": partial(_adapter_backward, torch.float32),
}

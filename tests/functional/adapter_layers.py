"""Layers of the adapter's tests, and the float64 reference that they are held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stella_kernels import stella_adapter, stella_linear
from stella_kernels.reference import adapter
from tests.random_matrices import orthonormal

KERNELS = torch.ops.stella_kernels
SCALE = 1.5


class Case(NamedTuple):
    lead: tuple[int, ...]
    m: int
    n: int
    r: int
    diagonal: bool = False
    bias: bool = True


CASES = [
    Case((37,), 53, 29, 5),
    Case((3, 7), 19, 41, 4, bias=False),
    Case((2, 3, 5), 17, 17, 17, diagonal=True),
    Case((11,), 9, 13, 1),
    Case((11,), 9, 13, 1, diagonal=True, bias=False),
    Case((), 23, 31, 3),
    Case((0,), 7, 6, 2),
    Case((2, 0, 3), 7, 6, 2, diagonal=True),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Layer(NamedTuple):
    x: Tensor
    W: Tensor
    b: Tensor | None
    U: Tensor
    S: Tensor
    Vt: Tensor


def make(case: Case, dtype: torch.dtype, requires_grad: bool = True, base_grad: bool = False) -> Layer:
    """U and V orthonormal, S with singular values in [1, 2]: the adapter is as large as the base, cond(S) <= 2."""
    m, n, r = case.m, case.n, case.r
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.rand(r, dtype=torch.float64) + 1
    S = values if case.diagonal else orthonormal(r, r) * values @ orthonormal(r, r)
    layer = Layer(
        torch.randn(*case.lead, n).to(dtype),
        (torch.randn(m, n) / math.sqrt(n)).to(dtype),
        torch.randn(m).to(dtype) if case.bias else None,
        orthonormal(m, r, dtype=factor),
        S.to(factor),
        orthonormal(n, r, dtype=factor).mT.contiguous(),
    )
    for name, value in layer._asdict().items():
        if value is not None:
            value.requires_grad_(requires_grad if name in ("x", "U", "S", "Vt") else base_grad)
    return layer


def reference(layer: Layer, grad_y: Tensor, p: float = 0.0, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """y and the gradients of x, W, b, U, S, Vt in float64."""
    x, W, U, S, Vt = (t.detach().double() for t in (layer.x, layer.W, layer.U, layer.S, layer.Vt))
    b = torch.zeros(W.shape[0], dtype=torch.float64) if layer.b is None else layer.b.detach().double()
    rows, grad = x.reshape(-1, x.shape[-1]), grad_y.double().reshape(-1, W.shape[0])
    delta, _ = adapter.adapter_forward(rows, U, S, Vt, SCALE, p, seed)
    y = (rows @ W.mT + b + delta).reshape(grad_y.shape)
    grads = adapter.adapter_backward(grad, rows, U, S, Vt, SCALE, p, seed)
    grad_x = (grad @ W + grads.x).reshape(x.shape)
    return y, grad_x, grad.mT @ rows, grad.sum(0), grads.U, grads.S, grads.Vt


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Relative Frobenius error of three products in ``dtype``, each accumulated over at most ``length`` terms.

    Stored values (three cast factors, A or Q, P or K, the base's result, the sum) are rounded seven times, u = eps/2
    each, amplified by cond(S) <= 2. An accumulated sum adds at most ``length`` u of its arithmetic's dtype times
    |a|ᵀ|b|, which exceeds the norm of a random product by at most sqrt(length); three products.
    """
    arithmetic = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    accumulated = 3 * length * math.sqrt(length) * torch.finfo(arithmetic).eps / 2
    return 2 * 7 * torch.finfo(dtype).eps / 2 + accumulated


def assert_close(name: str, found: Tensor, wanted: Tensor, bound: float, size: float | None = None) -> None:
    assert found.shape == wanted.shape, name
    error = float((found.detach().double() - wanted.detach()).norm())
    size = float(wanted.detach().norm()) if size is None else size
    assert error <= bound * size, f"{name}: error {error:.2e} of {size:.2e} is above {bound:.2e}"


def check(
    run: Callable[[Layer], Tensor], layer: Layer, p: float = 0.0, seed: Tensor | None = None, bound: float | None = None
) -> None:
    """``run``'s result and every gradient that is asked for, against the reference."""
    y = run(layer)
    grad_y = torch.randn_like(y)
    asked = {name: t for name, t in layer._asdict().items() if t is not None and t.requires_grad}
    grads = dict(zip(asked, torch.autograd.grad(y, list(asked.values()), grad_y), strict=True))
    wanted = reference(layer, grad_y, p, seed)
    if bound is None:
        bound = tolerance(y.dtype, max(*layer.W.shape, y.numel() // y.shape[-1]))
    assert_close("y", y, wanted[0], bound)
    # ∂S = Qᵀ A is r x r sums over T, which may cancel: its error is relative to ‖Q‖ ‖A‖
    Q = SCALE * grad_y.double().reshape(-1, layer.U.shape[0]) @ layer.U.detach().double()
    rows = adapter.dropped(layer.x.detach().double().reshape(-1, layer.x.shape[-1]), p, seed)
    size_S = float(Q.norm() * (rows @ layer.Vt.detach().double().mT).norm())
    for name, value in zip(Layer._fields, wanted[1:], strict=True):
        if name in asked:
            assert grads[name].dtype == asked[name].dtype, name
            assert_close(name, grads[name], value, bound, size_S if name == "S" else None)


def run_linear(layer: Layer) -> Tensor:
    return stella_linear(*layer, SCALE)


def run_adapter(layer: Layer) -> Tensor:
    x, W, b, U, S, Vt = layer
    return stella_adapter(torch.nn.functional.linear(x, W, b), x, U, S, Vt, SCALE)


def seed_of_next_call() -> Tensor:
    """The seed that the next dropout will draw, leaving the generator as it was."""
    state = torch.get_rng_state()
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    torch.set_rng_state(state)
    return seed


class DoubledLinear(nn.Linear):
    """A base that is not a plain matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

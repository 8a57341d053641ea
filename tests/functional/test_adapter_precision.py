"""Gradients of float32 factors beside activations in half precision; what forward and backward allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stella_kernels import stella_linear
from stella_kernels.operators import autograd, base_product
from stella_kernels.operators.fallback import REFERENCE, _summed_over_rows

SERVING = torch.ops.stella_kernels.adapter_backward_
T, M, N, R = 2100, 13, 11, 3  # more rows than are widened at one time
HALF = [torch.bfloat16, torch.float16]


def factor_gradients(operator: Any, dtype: torch.dtype, diagonal: bool, size: float = 1.0) -> tuple[Tensor, ...]:
    """∂U, ∂S, ∂Vᵀ of positive activations: nothing cancels."""
    x, grad_y = (1 + torch.rand(T, k) for k in (N, M))
    U, Vt = 1 + torch.rand(M, R), 1 + torch.rand(R, N)
    S = 1 + torch.rand(R) if diagonal else 1 + torch.rand(R, R)
    x, grad_y = x.to(dtype), (size * grad_y).to(dtype)
    A = (x.float() @ Vt.mT).to(dtype)
    return operator(None, 0.0, grad_y, x, A, U, S, Vt, 1.0, 0.0, None, [True] * 3)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("operator", [SERVING, REFERENCE["adapter_backward_"]], ids=["serving", "reference"])
def test_factor_gradients_are_not_rounded_to_half_precision(operator: Any, dtype: torch.dtype, diagonal: bool) -> None:
    """Sums over the rows come in float32 and stay there: they hold bits that half precision does not."""
    for gradient in factor_gradients(operator, dtype, diagonal):
        assert gradient.dtype == torch.float32
        # a float32 sum is a half-precision number by chance once in 2^13 (float16) or 2^16 (bfloat16)
        assert int((gradient != gradient.to(dtype).float()).sum()) >= gradient.numel() - 1


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("operator", [SERVING, REFERENCE["adapter_backward_"]], ids=["serving", "reference"])
def test_factor_gradients_may_exceed_float16(operator: Any, diagonal: bool) -> None:
    """Loss scaling makes them larger than 65504, which is infinite in float16."""
    for gradient in factor_gradients(operator, torch.float16, diagonal, size=20.0):
        assert bool(gradient.isfinite().all())
        assert float(gradient.min()) > 65504


@pytest.mark.parametrize("dtype", HALF)
def test_sum_over_rows_on_a_gpu_asks_for_float32(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        left, right = (torch.empty(T, k, dtype=dtype, device="cuda") for k in (M, R))
        total = _summed_over_rows(left, right)
    assert (total.shape, total.dtype, total.device.type) == ((M, R), torch.float32, "cuda")


class Allocated(TorchDispatchMode):
    """Numbers of elements of the storages that operators return and that were not there before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr(): t for t in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.numel() and t.untyped_storage().data_ptr() not in self.storages:
                self.storages[t.untyped_storage().data_ptr()] = t  # alive, so that no address comes twice
                self.sizes.append(t.numel())
        return out


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_adapter_share_one_output_and_one_input_gradient(
    dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a plain frozen linear both products accumulate in place: nothing else grows as the activations do.

    Where the library has the base's product; else blocks of it are widened in turn (``base_product.py``).
    """
    for module in (autograd, base_product):
        monkeypatch.setattr(module, "library_computes_in", lambda dtype: True)
    rows, m, n, r = 64, 48, 40, 2
    x, W = torch.randn(rows, n).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
    factors = [t.requires_grad_() for t in (torch.randn(m, r), torch.randn(r, r), torch.randn(r, n))]
    with Allocated(x, W, *factors) as forward:
        y = stella_linear(x, W, None, *factors, 1.0, p)
    grad_y = torch.randn_like(y)
    with Allocated(x, W, *factors, y, grad_y, *forward.storages.values()) as backward:
        torch.autograd.grad(y, [x, *factors], grad_y)
    small = max(m, n) * r
    assert [size for size in forward.sizes if size > max(small, rows * r)] == [rows * m]
    assert [size for size in backward.sizes if size > max(small, rows * r)] == [rows * n]

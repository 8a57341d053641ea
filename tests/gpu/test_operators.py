"""Every operator on the device against the float64 reference: odd sizes, storages, what it refuses, opcheck."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench.gpu import rehearsal
from bench.gpu.odd_cases import odd_cases
from stella_kernels import StellaLinear
from stella_kernels.functional import polar, stella_linear
from stella_kernels.operators.signatures import OPERATORS
from stella_kernels.reference import adapter as reference
from stella_kernels.verification.case_table import Case
from stella_kernels.verification.judge import check
from stella_kernels.verification.on_device import on

pytestmark = pytest.mark.gpu

INTERPRETED = rehearsal.interpreting()


def operators_on(device: torch.device) -> dict[str, Any]:
    """As torch dispatches them, for tensors of the CPU."""
    called = {name: getattr(torch.ops.stella_kernels, name) for name in OPERATORS}
    return called if device.type == "cpu" else {name: on("cuda", call) for name, call in called.items()}


@pytest.mark.parametrize("case", odd_cases(toy=INTERPRETED), ids=lambda case: case.name)
def test_odd_case(case: Case, device: torch.device) -> None:
    result = check(case, device.type, operators_on(device))
    assert result.passed, f"{result.what}: error {result.error:.2e}, tolerance {result.tolerance:.2e}"


def test_views_with_gaps_and_a_start_off_every_boundary(device: torch.device) -> None:
    """Tensors that begin 4 bytes behind an aligned address, with gaps between rows, transposed and not."""
    T, m, n, r = 37, 23, 29, 3
    x, U, S, Vt = (
        torch.full((rows * (columns + 3) + 1,), math.nan, device=device)[1:].view(rows, columns + 3)[:, :columns]
        for rows, columns in ((T, n), (m, r), (r, r), (r, n))
    )
    for tensor in (x, U, S, Vt):
        tensor.copy_(torch.randn(tensor.shape))
    for factors in ((U, S, Vt), (U.mT.contiguous().mT, S.mT.contiguous().mT, Vt.mT.contiguous().mT)):
        W = torch.zeros(m, n, device=device)
        y = stella_linear(x, W, None, *factors, 1.3)
        exact, _ = reference.adapter_forward(x.cpu().double(), *(t.cpu().double() for t in factors), 1.3, 0.0, None)
        assert float((y.cpu().double() - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("r", [1, 5])
def test_results_are_on_the_device(device: torch.device, r: int) -> None:
    layer = StellaLinear(torch.nn.Linear(19, 21, device=device), r=r)
    x = torch.randn(11, 19, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.device.type == device.type
    for tensor in (x, layer.U, layer.S, layer.Vt):
        assert tensor.grad is not None
        assert tensor.grad.device.type == device.type
        assert bool(tensor.grad.isfinite().all())


def test_no_rows_at_all(device: torch.device) -> None:
    layer = StellaLinear(torch.nn.Linear(7, 9, device=device), r=2)
    x = torch.empty(0, 7, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert float(layer.U.grad.abs().sum()) == 0.0
    assert polar(torch.empty(0, 5, 2, device=device)).shape == (0, 5, 2)


def test_a_matrix_that_is_not_finite_is_refused(device: torch.device) -> None:
    M = torch.randn(3, 11, 2, device=device)
    M[1, 4, 1] = math.nan
    with pytest.raises(RuntimeError, match="matrix 1"):
        polar(M)


def test_opcheck(device: torch.device) -> None:
    """Schemas, fakes, and what is registered for autograd, with tensors of the device."""
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    seed = torch.tensor(5, device=device)
    Y = torch.linalg.qr(made(13, 3)).Q.contiguous()
    factors = made(9, 3), made(3, 3), made(3, 11)
    row = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 1.0, 1.0, 1.0]], dtype=torch.float64)
    moments = [[torch.zeros_like(Y)] for _ in range(2)]
    calls: dict[str, tuple[Any, ...]] = {
        "polar": (made(2, 13, 3), "auto"),
        "riemannian_gradient_": ([made(13, 3)], [Y], []),
        "project_retract_": ([Y + 0.1 * made(13, 3)], [Y], [1.0], "auto"),
        "stella_adamw_": ([Y.clone()], [made(13, 3)], *moments, [Y.new_empty(0)], row),
        "philox_dropout": (made(7, 11), 0.3, seed),
        "adapter_forward_": (made(7, 9), made(7, 11), *factors, 1.3, 0.3, seed),
        "adapter_product": (made(7, 11), made(9), *factors, 1.3, 0.3, seed),
        "adapter_backward_": (
            *(made(7, 11), 0.5, made(7, 9), made(7, 11), made(7, 3)), *factors, 1.3, 0.3, seed, [True] * 3,
        ),
    }  # fmt: skip
    assert set(calls) == set(OPERATORS)
    for name, arguments in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.stella_kernels, name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )

"""The adapter under autocast and under the compiler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stella_kernels import stella_adapter, stella_linear
from stella_kernels.reference import adapter
from tests.functional.adapter_layers import (
    KERNELS,
    SCALE,
    Case,
    Layer,
    assert_close,
    check,
    make,
    run_adapter,
    run_linear,
    tolerance,
)

# Autocast, mixed dtypes


@pytest.mark.parametrize("run", [run_linear, run_adapter])
def test_autocast(run: Callable[[Layer], Tensor]) -> None:
    layer = make(Case((3, 8), 21, 34, 4), torch.float32, base_grad=run is run_linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(layer)
    assert y.dtype == torch.bfloat16

    def forward(layer: Layer) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(layer)

    # x and W are rounded to bfloat16 as well
    check(forward, layer, bound=tolerance(torch.bfloat16, 34) + 2 * torch.finfo(torch.bfloat16).eps)


def test_autocast_with_a_float32_base_output() -> None:
    """A base that leaves autocast decides: the adapter computes in the dtype of y."""
    layer = make(Case((5,), 6, 7, 2), torch.float32, requires_grad=False)
    y = torch.zeros(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stella_adapter(y, layer.x, layer.U, layer.S, layer.Vt, SCALE)
    wanted, _ = adapter.adapter_forward(*(t.double() for t in (layer.x, layer.U, layer.S, layer.Vt)), SCALE)
    assert_close("y", y, wanted, tolerance(torch.float32, 7))


# The compiler, and second derivatives


def opcheck_cases() -> list[tuple[object, tuple[object, ...]]]:
    x, _, _, U, S, Vt = make(Case((5,), 7, 6, 2), torch.float32, requires_grad=False)
    D = torch.rand(2)
    seed = torch.tensor(3)
    y, A, grad_x = torch.randn(5, 7), torch.randn(5, 2), torch.randn(5, 6)
    forward, backward = KERNELS.adapter_forward_.default, KERNELS.adapter_backward_.default
    return [
        (KERNELS.philox_dropout.default, (x, 0.3, seed)),
        (forward, (y, x, U, S, Vt, 0.5, 0.0, None)),
        (forward, (y, x, U, D, Vt, 0.5, 0.3, seed)),
        (KERNELS.adapter_product.default, (x, None, U, S, Vt, 0.5, 0.3, seed)),
        (KERNELS.adapter_product.default, (x, y[0], U, D, Vt, 0.5, 0.0, None)),
        (backward, (grad_x, 1.0, y, x, A, U, S, Vt, 0.5, 0.3, seed, [True, True, True])),
        (backward, (grad_x, 0.0, y, x, A, U, D, Vt, 0.5, 0.0, None, [False, True, False])),
        (backward, (None, 0.0, y, x, A, U, D, Vt, 0.5, 0.0, None, [True, False, True])),
    ]


@pytest.mark.parametrize("index", range(8))
def test_opcheck(index: int) -> None:
    operator, arguments = opcheck_cases()[index]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str, opaque: bool) -> None:
    torch._dynamo.reset()
    layer = make(Case((4, 6), 9, 11, 3), torch.float32)  # m != n shows a gradient that lands on the wrong input

    def body(x: Tensor, U: Tensor, S: Tensor, Vt: Tensor) -> Tensor:
        if opaque:
            y = torch.nn.functional.linear(x * 1.0, layer.W, layer.b)
            return stella_adapter(y, x, U, S, Vt, SCALE, 0.3)
        return stella_linear(x, layer.W, layer.b, U, S, Vt, SCALE, 0.3)

    inputs = (layer.x, layer.U, layer.S, layer.Vt)
    grad_y = torch.randn(4, 6, 9)
    results = []
    # inductor draws other random numbers than eager torch unless told to fall back; the mask must be the same here
    with torch._inductor.config.patch(fallback_random=True):
        for run in (body, torch.compile(body, fullgraph=True, backend=backend)):
            torch.manual_seed(4)
            y = run(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, grad_y)))
    for name, eager, compiled in zip(("y", "x", "U", "S", "Vt"), *results, strict=True):
        # the same operators on the same numbers; the base's product and the sum of x's two gradients may be reordered
        assert_close(name, compiled, eager.double(), tolerance(torch.float32, 11))


def test_compiles_once_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return module.forward

    layer = make(Case((4, 6), 9, 11, 3), torch.float32, requires_grad=False)
    run = torch.compile(lambda x: stella_linear(x, *layer[1:], SCALE), fullgraph=True, backend=count, dynamic=True)
    for rows in (5, 7, 12):  # none equal to another size: the compiler would take them for one
        x = torch.randn(2, rows, 11)
        assert_close("y", run(x), stella_linear(x, *layer[1:], SCALE).double(), tolerance(torch.float32, 11))
    assert graphs == 1

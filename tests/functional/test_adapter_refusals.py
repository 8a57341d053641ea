"""What the adapter refuses: second derivatives, transforms of functions, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stella_kernels import stella_adapter, stella_linear
from tests.functional.adapter_layers import SCALE, Case, Layer, make, run_adapter, run_linear


@pytest.mark.parametrize("run", [run_linear, run_adapter])
def test_second_derivative_is_an_error(run: Callable[[Layer], Tensor]) -> None:
    layer = make(Case((4,), 5, 6, 2), torch.float64)
    (gradient,) = torch.autograd.grad(run(layer).square().sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
    # also where the incoming gradient is a constant, and the first derivative depends on U and V alone
    (gradient,) = torch.autograd.grad(run(layer).sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (gradient.sum() + layer.x.sum()).backward()


@pytest.mark.parametrize("run", [run_linear, run_adapter])
def test_transforms_of_functions_are_refused(run: Callable[[Layer], Tensor]) -> None:
    layer = make(Case((4,), 5, 6, 2), torch.float32, requires_grad=False)
    name = "stella_linear" if run is run_linear else "stella_adapter"

    def of_x(x: Tensor) -> Tensor:
        return run(layer._replace(x=x))

    with pytest.raises(NotImplementedError, match=f"{name}: called under a transform of torch.func"):
        torch.func.vmap(of_x)(layer.x)
    with pytest.raises(NotImplementedError, match=f"{name}: called under a transform of torch.func"):
        torch.func.grad(lambda x: of_x(x).sum())(layer.x)
    tangent = torch.ones_like(layer.x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        of_x(torch.autograd.forward_ad.make_dual(layer.x, tangent))


# Bad input


def replace_with(**changes: object) -> dict[str, object]:
    layer = make(Case((4,), 5, 6, 2), torch.float32)
    return {**layer._asdict(), "scale": 1.0, "dropout_p": 0.0, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, 7)}, ValueError, r"x: found shape \(4, 7\), wanted \(\.\.\., 6\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: found shape"),
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "x: found dtype torch.int64"),
        ({"x": [1.0]}, TypeError, "x: found list"),
        ({"x": torch.zeros(4, 6).to_sparse()}, TypeError, r"x: found layout torch\.sparse_coo.*x\.to_dense"),
        ({"x": torch.zeros(4, 6, dtype=torch.bfloat16)}, TypeError, "W: found dtype torch.float32 with x in torch.bfl"),
        ({"W": torch.zeros(6, 5)}, ValueError, r"W: found shape \(6, 5\), wanted \(5, 6\)"),
        ({"b": torch.zeros(6)}, ValueError, r"b: found shape \(6,\), wanted \(5,\)"),
        ({"b": torch.zeros(5, dtype=torch.float64)}, TypeError, "b: found dtype torch.float64"),
        ({"U": torch.zeros(5)}, ValueError, "U: found shape"),
        ({"U": torch.zeros(5, 2, dtype=torch.int32)}, TypeError, "U: found dtype torch.int32"),
        ({"Vt": torch.zeros(6, 2)}, ValueError, r"Vt: found shape \(6, 2\).*V\.mT"),
        ({"U": torch.zeros(5, 7), "Vt": torch.zeros(7, 6), "S": torch.zeros(7)}, ValueError, "rank r = 7 above"),
        ({"S": torch.zeros(3, 3)}, ValueError, r"S: found shape \(3, 3\), wanted \(2, 2\)"),
        ({"S": torch.zeros(2, 2, device="meta")}, ValueError, "S: found on meta, wanted cpu"),
        ({"W": torch.zeros(5, 6, device="meta")}, ValueError, "W: found on meta"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p: found 1.5, wanted a probability"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
        ({"dropout_p": "half"}, TypeError, "dropout_p: found str"),
        ({"scale": None}, TypeError, "scale: found NoneType"),
    ],
)
def test_bad_input_to_stella_linear(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = replace_with(**changes)
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        stella_linear(**arguments)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, r"y: found shape \(3, 5\), wanted \(4, 5\)"),
        (torch.zeros(4, 5, device="meta"), ValueError, "y: found on meta"),
        (torch.zeros(4, 5, dtype=torch.int8), TypeError, "y: found dtype torch.int8"),
        (torch.zeros(4, 5, requires_grad=True), ValueError, "y: found a leaf"),
    ],
)
def test_bad_base_output(y: Tensor, error: type[Exception], message: str) -> None:
    layer = make(Case((4,), 5, 6, 2), torch.float32)
    before = y.detach().clone()
    with pytest.raises(error, match=message):
        stella_adapter(y, layer.x, layer.U, layer.S, layer.Vt, SCALE)
    if y.device.type == "cpu":
        assert torch.equal(y.detach(), before)

"""The adapter and the polar factor are differentiable once: a second derivative is an error, never a wrong number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional as by_autograd
from torch.utils.checkpoint import checkpoint

import stella_kernels as sk

N, M, R = 6, 5, 2


def layer(opaque: bool, recompute: bool = False) -> nn.Module:
    base = nn.Linear(N, M, dtype=torch.float64)
    if opaque:
        base.register_forward_hook(lambda module, args, output: None)
    return sk.StellaLinear(base, r=R, dtype=torch.float64, recompute=recompute)


FUNCTIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "linear": lambda: layer(opaque=False),
    "adapter": lambda: layer(opaque=True),
    "recomputed": lambda: layer(opaque=False, recompute=True),
    "polar": lambda: lambda x: sk.polar(x.reshape(3, 2)),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@each_function
@pytest.mark.parametrize(
    "second",
    [
        lambda f, x: by_autograd.hessian(lambda x: f(x).pow(3).sum(), x),
        lambda f, x: by_autograd.hvp(lambda x: f(x).pow(3).sum(), x, torch.ones_like(x)),
        lambda f, x: by_autograd.jvp(f, x, torch.ones_like(x)),  # twice backward
    ],
    ids=["hessian", "hvp", "jvp"],
)
def test_second_derivatives_by_the_input_are_refused(name: str, second: Callable[..., object]) -> None:
    """These ask for the gradient by one tensor and take "not in the graph" for zero."""
    x = torch.randn(N, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="differentiable once"):
        second(FUNCTIONS[name](), x)


@each_function
def test_create_graph_without_a_second_derivative(name: str) -> None:
    """The first gradient is the same, and only what depends on it refuses."""
    f = FUNCTIONS[name]()
    x = torch.randn(N, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(f(x).pow(3).sum(), x)
    (found,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
    assert torch.equal(found, wanted)
    f(x).pow(3).sum().backward(create_graph=True)
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)
    (unrelated,) = torch.autograd.grad((x * x).sum(), x)
    assert torch.equal(unrelated, 2 * x.detach())


def test_gradient_of_a_factor_by_the_input_is_refused() -> None:
    model = layer(opaque=False)
    x = torch.randn(N, dtype=torch.float64, requires_grad=True)
    (grad_U,) = torch.autograd.grad(model(x).sum(), model.U, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad_U.sum(), x, allow_unused=True)


@each_function
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_reads_what_was_saved_once(name: str, use_reentrant: bool) -> None:
    f = FUNCTIONS[name]()
    x = torch.randn(N, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(f(x).pow(3).sum(), x)
    checkpoint(f, x, use_reentrant=use_reentrant).pow(3).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)

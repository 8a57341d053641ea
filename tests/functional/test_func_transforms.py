"""torch.func's transforms and batches of gradients over the adapter: what is not computed is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional as by_autograd

from stella_kernels import StellaLinear

N, M, R = 6, 5, 2
both = pytest.mark.parametrize("opaque", [False, True])


def layer(opaque: bool) -> StellaLinear:
    base = nn.Linear(N, M, dtype=torch.float64)
    if opaque:
        base.register_forward_hook(lambda module, args, output: None)
    return StellaLinear(base, r=R, dtype=torch.float64)


@both
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    "transform",
    [lambda f: torch.func.grad(lambda x: f(x).square().sum()), lambda f: torch.func.vmap(f)],
    ids=["grad", "vmap"],
)
def test_compiled_transforms_are_refused(
    transform: Callable[[Callable[..., Tensor]], Callable[..., Tensor]], opaque: bool, fullgraph: bool
) -> None:
    """The compiler takes an autograd function through a transform, and gets its gradient wrong."""
    torch._dynamo.reset()
    compiled = torch.compile(transform(layer(opaque)), backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match="called under a transform"):
        compiled(torch.randn(4, N, dtype=torch.float64))


@both
def test_a_batch_of_gradients_is_refused(opaque: bool) -> None:
    model, x = layer(opaque), torch.randn(N, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="batch of output gradients"):
        by_autograd.jacobian(model, x, vectorize=True)
    x.requires_grad_()
    y = model(x)
    with pytest.raises(NotImplementedError, match="batch of output gradients"):
        torch.autograd.grad(y, x, torch.eye(M, dtype=torch.float64), is_grads_batched=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match="batch of output gradients"):
        torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(torch.eye(M).double())


@both
def test_a_jacobian_row_by_row(opaque: bool) -> None:
    model = layer(opaque)
    found = by_autograd.jacobian(model, torch.randn(N, dtype=torch.float64))
    wanted = model.merged_weight()
    # sums of at most 6 terms in float64: 1e-14 is 45 roundings
    assert float((found - wanted).norm()) <= 1e-14 * float(wanted.norm())

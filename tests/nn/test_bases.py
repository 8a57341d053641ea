"""What stands around the base layer: hooks, memory that others hold, devices, input that is no matrix in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from stella_kernels import StellaLinear, stella_adapter, stella_linear

N, M, R = 6, 5, 2


def stella(base: nn.Module) -> nn.Module:
    return StellaLinear(base, r=R)


def peft(base: nn.Module) -> nn.Module:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from stella_kernels.peft import StellaConfig

    return get_peft_model(nn.Sequential(base), StellaConfig(r=R, target_modules=["0"]))


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(M, N)


each_face = pytest.mark.parametrize("adapt", [stella, peft])
Calls = list[type]


def on_module(method: str) -> Callable[[nn.Module, Calls], None]:
    return lambda base, calls: getattr(base, method)(lambda module, *args: calls.append(type(module)))


HOOKS = {
    name: on_module(f"register_{name}")
    for name in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
}


@each_face
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_base_run_and_nothing_overwrites_what_they_see(
    adapt: Callable[[nn.Module], nn.Module], name: str, conv: bool
) -> None:
    if conv and adapt is stella:
        pytest.skip("Conv1D has no in_features; PEFT's layer knows it")
    base = conv1d() if conv else nn.Linear(N, M)
    model = adapt(base)
    x, grad_y = torch.randn(4, N), torch.randn(4, M)
    plain = x.clone().requires_grad_()
    wanted = (model(plain), *torch.autograd.grad(model(plain), plain, grad_y))
    calls: Calls = []
    HOOKS[name](base, calls)
    hooked = x.clone().requires_grad_()
    y = model(hooked)
    found = (y, *torch.autograd.grad(y, hooked, grad_y))
    assert calls == [type(base)]
    for a, b in zip(found, wanted, strict=True):
        # the same sums of at most 8 terms, in two products, in another order
        assert float((a - b).norm()) <= 2 * 8 * torch.finfo(torch.float32).eps * float(b.norm())


@each_face
@pytest.mark.parametrize(
    "register", [all_modules.register_module_forward_hook, all_modules.register_module_full_backward_hook]
)
def test_global_hooks_see_the_base(adapt: Callable[[nn.Module], nn.Module], register: Callable[..., object]) -> None:
    model = adapt(nn.Linear(N, M))
    calls: Calls = []
    with register(lambda module, *args: calls.append(type(module))):  # type: ignore[attr-defined]
        model(torch.randn(4, N, requires_grad=True)).sum().backward()
    assert nn.Linear in calls


@pytest.mark.parametrize("shape", [(4, M), (2, 4, M)])
def test_an_expanded_base_output_is_refused(shape: tuple[int, ...]) -> None:
    """Its rows are one memory, and would get the sum of all rows' adapters."""
    y = torch.randn(M).expand(shape)
    before = y.clone()
    x = torch.randn(*shape[:-1], N)
    U, S, Vt = torch.randn(M, R), torch.randn(R, R), torch.randn(R, N)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"y: found strides .*y\.clone\(\)"):
        stella_adapter(y, x, U, S, Vt, 1.0, 0.5)
    assert torch.equal(y, before)
    assert torch.equal(torch.get_rng_state(), state)
    # a dimension of size 1 has a stride without meaning
    one = torch.zeros(1, M).as_strided((1, M), (0, 1))
    assert stella_adapter(one, torch.randn(1, N), U, S, Vt, 1.0) is one


@pytest.mark.parametrize("hooked", [False, True])
def test_meta_device(hooked: bool) -> None:
    """Shapes without numbers, forward and backward."""
    base = nn.Linear(N, M, device="meta")
    if hooked:
        base.register_forward_hook(lambda module, args, output: None)
    layer = StellaLinear(base, r=R, dropout=0.3)
    x = torch.empty(3, 4, N, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, y.device.type) == ((3, 4, M), "meta")
    for t in (x, layer.U, layer.S, layer.Vt):
        assert t.grad is not None
        assert (t.grad.shape, t.grad.device.type) == (t.shape, "meta")


@pytest.mark.parametrize("recompute", [False, True])
def test_input_that_is_no_matrix_in_memory_is_saved_as_it_is(recompute: bool) -> None:
    """A shorter sequence cut out of a longer one has no rows of one stride: no copy of it is kept for backward."""
    source = torch.randn(3, 9, N)
    x = source[:, :-1].detach().requires_grad_()
    with pytest.raises(RuntimeError, match="view"):
        x.view(-1, N)
    W, U, S, Vt = (torch.randn(*shape).requires_grad_() for shape in ((M, N), (M, R), (R, R), (R, N)))
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.numel() == x.numel():
            saved.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = stella_linear(x, W, None, U, S, Vt, 1.0, recompute=recompute)
    assert saved == [source.untyped_storage().data_ptr()]
    leaves = (x, W, U, S, Vt)
    grad_y = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, grad_y)
    wanted = torch.autograd.grad(x @ W.mT + x @ Vt.mT @ S.mT @ U.mT, leaves, grad_y)
    for a, b in zip(found, wanted, strict=True):
        # three products of sums of at most 24 terms, in float32
        assert float((a - b).norm()) <= 3 * 24 * torch.finfo(torch.float32).eps * float(b.norm())

"""Modules with adapters under torch's transforms: compile, checkpoint, export, autocast, DDP, functional_call."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stella_kernels import StellaLinear

EPS = torch.finfo(torch.float32).eps
N, HIDDEN, M = 12, 20, 9


class Block(nn.Module):
    """Two adapted layers, the second on a base that is opaque, and what stands between them in a model."""

    def __init__(self, dropout: float = 0.0, base_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        opaque = nn.Linear(HIDDEN, M, dtype=base_dtype)
        opaque.register_forward_hook(lambda module, args, output: None)
        self.up = StellaLinear(nn.Linear(N, HIDDEN, dtype=base_dtype), r=3, dropout=dropout)
        self.down = StellaLinear(opaque, r=4, dropout=dropout, diag_s=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def results(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """Output and gradients of the input and the factors, from one state of the generator."""
    torch.manual_seed(2)
    inputs = x.clone().requires_grad_()
    y = run(inputs)
    leaves = [inputs, *trained(model)]
    for leaf in leaves:
        leaf.grad = None
    y.backward(grad_y)  # reentrant checkpointing knows no autograd.grad
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        # the same sums of at most 60 terms, perhaps in another order, in four products one after the other
        assert float((a - b).norm()) <= 4 * 60 * EPS * float(b.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_with_dynamic_shapes(backend: str, dropout: float) -> None:
    torch._dynamo.reset()
    model = Block(dropout).train()
    # inductor draws other random numbers than eager torch unless told to fall back; the mask must be the same here
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for rows in (5, 11, 17):
            x, grad_y = torch.randn(3, rows, N), torch.randn(3, rows, M)
            assert_same(results(model, compiled, x, grad_y), results(model, model, x, grad_y))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_model_is_bitwise_plain(use_reentrant: bool, dtype: torch.dtype) -> None:
    model = Block(0.3, dtype).train()
    x, grad_y = torch.randn(3, 50, N).to(dtype), torch.randn(3, 50, M).to(dtype)

    def in_parts(x: Tensor) -> Tensor:
        hidden = checkpoint(model.up, x, use_reentrant=use_reentrant)
        return checkpoint(model.down, torch.tanh(hidden), use_reentrant=use_reentrant)

    for run in (in_parts, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        for a, b in zip(results(model, run, x, grad_y), results(model, model, x, grad_y), strict=True):
            assert torch.equal(a, b)


def test_generator_state_gives_the_mask_again() -> None:
    model, x = Block(0.5).train(), torch.randn(4, N)
    state = torch.get_rng_state()
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.set_rng_state(state)
    assert torch.equal(first, model(x))


@pytest.mark.parametrize("merged", [False, True])
def test_export(merged: bool) -> None:
    model = Block(0.3).eval()
    if merged:
        for name in ("up", "down"):
            layer = getattr(model, name)
            plain = nn.Linear(layer.in_features, layer.out_features)
            with torch.no_grad():
                plain.weight.copy_(layer.merged_weight())
                plain.bias.copy_(layer.base.bias)
            setattr(model, name, plain)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 6, N),), dynamic_shapes={"x": {0: batch}})
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("stella_kernels" in name for name in operators) is not merged
    x = torch.randn(7, 6, N)
    with torch.no_grad():
        assert_same([program.module()(x)], [model(x)])


def test_functional_call_and_its_gradient() -> None:
    model, x = Block(), torch.randn(4, N)
    other = {name: torch.randn_like(p) * 0.3 for name, p in model.named_parameters()}
    moved = copy.deepcopy(model)
    moved.load_state_dict({**moved.state_dict(), **other})
    with torch.no_grad():
        assert_same([torch.func.functional_call(model, other, (x,))], [moved(x)])
    leaf = {**other, "up.U": other["up.U"].clone().requires_grad_()}
    (found,) = torch.autograd.grad(torch.func.functional_call(model, leaf, (x,)).square().sum(), leaf["up.U"])
    (wanted,) = torch.autograd.grad(moved(x).square().sum(), moved.up.U)
    assert_same([found], [wanted])


@pytest.mark.parametrize("opaque", [False, True])
def test_autocast_returns_what_lora_returns(opaque: bool) -> None:
    """bfloat16 out of float32 weights inside autocast, gradients of the factors in float32."""
    peft = pytest.importorskip("peft")
    base = nn.Linear(N, M)
    lora = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(r=3, target_modules=["0"]))
    if opaque:
        base.register_forward_hook(lambda module, args, output: None)
    layer, x = StellaLinear(base, r=3), torch.randn(5, N)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = layer(x), lora(x)
    assert y.dtype == wanted.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for factor in (layer.U, layer.S, layer.Vt):
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
    exact = base(x).double() + layer.scale * x.double() @ layer.Vt.double().mT @ layer.S.double() @ layer.U.double().mT
    # eight values are rounded to bfloat16 on the way, each no larger than the sum of the two norms
    size = float((base(x).double().norm() + (exact - base(x).double()).norm()).detach())
    assert float((y.double() - exact).detach().norm()) <= 8 * torch.finfo(torch.bfloat16).eps * size


def test_bfloat16_activations_make_no_float32_copy() -> None:
    """With float32 factors beside a bfloat16 model, nothing in float32 grows with the number of rows past a block."""
    T, n, m = 4096, 64, 48
    layer = StellaLinear(nn.Linear(n, m, dtype=torch.bfloat16), r=4, dropout=0.1).train()
    x = torch.randn(T, n).bfloat16().requires_grad_()
    shapes: list[tuple[torch.dtype, int]] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor):
                    shapes.append((t.dtype, t.numel()))
            return out

    with Seen():
        y = layer(x)
        grads = torch.autograd.grad(y, [x, layer.U, layer.S, layer.Vt], torch.ones_like(y))
    assert [g.dtype for g in grads] == [torch.bfloat16] + [torch.float32] * 3
    assert max(size for dtype, size in shapes if dtype == torch.float32) <= 1024 * n
    assert max(size for _, size in shapes) == T * n  # the input gradient itself


def test_data_parallel_of_one_process() -> None:
    """Gradients through DDP's buckets, gloo, one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = Block()
    x, grad_y = torch.randn(4, N), torch.randn(4, M)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=1, rank=0)
    try:
        wanted = results(model, model, x, grad_y)
        model.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x).backward(grad_y)
        assert_same([p.grad for p in trained(model)], wanted[2:])
    finally:
        torch.distributed.destroy_process_group()

"""The adapter: equations, operators and autograd functions against the float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stella_kernels import stella_adapter, stella_linear
from stella_kernels.operators import autograd
from stella_kernels.reference import adapter, philox
from tests.functional.adapter_layers import (
    CASES,
    DTYPES,
    KERNELS,
    SCALE,
    Case,
    Layer,
    assert_close,
    check,
    make,
    run_adapter,
    run_linear,
    seed_of_next_call,
    tolerance,
)

# The reference itself


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_reference_gradients_are_those_of_the_forward_formula(diagonal: bool, p: float) -> None:
    layer = make(Case((13,), 11, 9, 3, diagonal), torch.float64)
    seed = torch.tensor(77)
    x, U, S, Vt = layer.x, layer.U, layer.S, layer.Vt
    core = S.diag() if diagonal else S
    kept = philox.dropout_mask(x.shape, p, seed).double() * philox.kept_scale(p) if p else torch.ones_like(x)
    y = SCALE * (U @ core @ Vt @ (x * kept).mT).mT
    grad_y = torch.randn_like(y)
    delta, _ = adapter.adapter_forward(x, U, S, Vt, SCALE, p, seed)
    found = adapter.adapter_backward(grad_y, x, U, S, Vt, SCALE, p, seed)
    bound = tolerance(torch.float64, 13)
    assert_close("y", delta, y, bound)
    for name, gradient, wanted in zip(found._fields, found, torch.autograd.grad(y, (x, U, S, Vt), grad_y), strict=True):
        assert_close(name, gradient, wanted, bound)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_reference_gradcheck(diagonal: bool, p: float) -> None:
    seed = torch.tensor(5)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return adapter.adapter_forward(*tensors, SCALE, p, seed)[0]

        @staticmethod
        def backward(ctx, grad_y: Tensor) -> tuple[Tensor, ...]:
            return tuple(adapter.adapter_backward(grad_y, *ctx.saved_tensors, SCALE, p, seed))

    layer = make(Case((6,), 5, 4, 2, diagonal), torch.float64)
    assert torch.autograd.gradcheck(Reference.apply, (layer.x, layer.U, layer.S, layer.Vt))


def test_reference_dropout_without_a_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="seed"):
        adapter.dropped(torch.randn(2, 2), 0.5, None)


# Forward and backward


@pytest.mark.parametrize("run", [run_linear, run_adapter])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_reference(case: Case, dtype: torch.dtype, run: Callable[[Layer], Tensor]) -> None:
    check(run, make(case, dtype))


@pytest.mark.parametrize("adapter_first", [False, True])
@pytest.mark.parametrize("case", CASES[:3])
def test_either_order_of_base_and_adapter(case: Case, adapter_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "_FEW_WEIGHTS", 1 << 62 if adapter_first else 0)
    first = autograd._adapter_goes_first(torch.empty(2, 3), torch.empty(4, 3))
    assert first is adapter_first
    check(run_linear, make(case, torch.float32))


@pytest.mark.parametrize("adapter_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_either_order_compiles_whole(dtype: torch.dtype, adapter_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "_FEW_WEIGHTS", 1 << 62 if adapter_first else 0)
    torch._dynamo.reset()
    check(torch.compile(run_linear, backend="aot_eager", fullgraph=True), make(CASES[0], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[:3])
def test_gradients_of_the_base(case: Case, dtype: torch.dtype) -> None:
    check(run_linear, make(case, dtype, base_grad=True))


@pytest.mark.parametrize("run", [run_linear, run_adapter])
def test_only_what_needs_a_gradient(run: Callable[[Layer], Tensor]) -> None:
    names = ("x", "U", "S", "Vt")
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        layer = make(Case((6,), 7, 5, 2), torch.float32)
        for name, needed in zip(names, wanted, strict=True):
            getattr(layer, name).requires_grad_(needed)
        run(layer).sum().backward()
        assert [getattr(layer, name).grad is not None for name in names] == list(wanted)
        assert layer.W.grad is None
        check(run, layer)


@pytest.mark.parametrize("run", [run_linear, run_adapter])
def test_non_contiguous_input_and_factors(run: Callable[[Layer], Tensor]) -> None:
    layer = make(Case((4, 6), 9, 11, 3), torch.float32)
    strided = [
        torch.empty(6, 11, 4).permute(2, 0, 1).copy_(layer.x.detach()),
        layer.W,
        layer.b,
        layer.U.detach().mT.contiguous().mT,
        layer.S.detach().mT.contiguous().mT,
        layer.Vt.detach().mT.contiguous().mT,
    ]
    for i in (0, 3, 4, 5):
        assert not strided[i].is_contiguous()
        strided[i].requires_grad_()
    check(run, Layer(*strided))


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_non_contiguous_base_output(order: tuple[int, ...]) -> None:
    """Strides that flatten to (T, m) as a view, and strides that do not."""
    layer = make(Case((4, 6), 9, 11, 3), torch.float32)
    back = tuple(order.index(i) for i in range(3))

    def run(layer: Layer) -> Tensor:
        x, W, b, U, S, Vt = layer
        y = (x @ W.mT + b).permute(order).contiguous().permute(back)
        assert not y.is_contiguous()
        return stella_adapter(y, x, U, S, Vt, SCALE)

    check(run, layer)


def test_base_output_that_is_a_view() -> None:
    """Conv1D-like bases return a view of a flat product."""
    layer = make(Case((4, 6), 9, 11, 3), torch.float32)

    def run(layer: Layer) -> Tensor:
        x, W, b, U, S, Vt = layer
        return stella_adapter(torch.addmm(b, x.reshape(-1, 11), W.mT).view(4, 6, 9), x, U, S, Vt, SCALE)

    check(run, layer)


def test_adapter_accumulates_in_place() -> None:
    layer = make(Case((4, 6), 9, 11, 3), torch.float32, requires_grad=False)
    y = torch.randn(4, 6, 9)
    before = y.clone()
    result = stella_adapter(y, layer.x, layer.U, layer.S, layer.Vt, SCALE)
    assert result is y
    assert not torch.equal(y, before)


@pytest.mark.parametrize("overlap", ["same", "view", "shifted"])
def test_base_output_that_shares_memory_with_the_input(overlap: str) -> None:
    """A base that returns its input: what backward needs of x is not what y has become."""
    layer = make(Case((4,), 6, 6, 2), torch.float64)
    source = torch.randn(4, 8, dtype=torch.float64)

    def gradients(apart: bool) -> list[Tensor]:
        buffer = source.clone()
        x = buffer[:, :6]
        y = {"same": x, "view": x.view_as(x), "shifted": buffer[:, 2:]}[overlap]
        y, x = (y.clone(), x.clone()) if apart else (y, x)
        out = stella_adapter(y, x, layer.U, layer.S, layer.Vt, SCALE)
        return [out.detach().clone(), *torch.autograd.grad(out.square().sum(), (layer.U, layer.S, layer.Vt))]

    for found, wanted in zip(gradients(False), gradients(True), strict=True):
        # the same sums of at most 8 terms, perhaps in another order: 1e-13 is 450 roundings
        assert (found - wanted).norm() <= 1e-13 * wanted.norm()


def test_operators_ignore_what_their_buffers_held() -> None:
    """With beta = 0 a poisoned grad_x is overwritten, not multiplied by zero."""
    layer = make(Case((5,), 7, 6, 2), torch.float64, requires_grad=False)
    x, _, _, U, S, Vt = layer
    grad_y = torch.randn(5, 7, dtype=torch.float64)
    for p, seed in ((0.0, None), (0.5, torch.tensor(9))):
        A = KERNELS.adapter_forward_(torch.full((5, 7), torch.nan, dtype=torch.float64), x, U, S, Vt, SCALE, p, seed)
        wanted = adapter.adapter_backward(grad_y, x, U, S, Vt, SCALE, p, seed)
        needed = [True] * 3
        poisoned = torch.full_like(x, torch.nan)
        grads = KERNELS.adapter_backward_(poisoned, 0.0, grad_y, x, A, U, S, Vt, SCALE, p, seed, needed)
        ones = torch.ones_like(x)
        KERNELS.adapter_backward_(ones, 2.0, grad_y, x, A, U, S, Vt, SCALE, p, seed, needed)
        bound = tolerance(torch.float64, 7)
        for name, found, value in zip(wanted._fields, (poisoned, *grads), wanted, strict=True):
            assert_close(name, found, value, bound)
        assert_close("accumulated", ones, 2 + wanted.x, bound)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(diagonal: bool, bias: bool) -> None:
    layer = make(Case((2, 3), 5, 4, 2, diagonal, bias), torch.float64, base_grad=True)
    tensors = [t for t in layer if t is not None]

    def linear(*args: Tensor) -> Tensor:
        full = args if bias else (*args[:2], None, *args[2:])
        return stella_linear(*full, SCALE)

    def onto(y: Tensor, x: Tensor, U: Tensor, S: Tensor, Vt: Tensor) -> Tensor:
        return stella_adapter(y * 1.0, x, U, S, Vt, SCALE)

    assert torch.autograd.gradcheck(linear, tensors)
    y = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(onto, (y, layer.x, layer.U, layer.S, layer.Vt))


# Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_uses_one_mask_forward_and_backward(p: float, dtype: torch.dtype) -> None:
    layer = make(Case((3, 17), 19, 23, 4), dtype)
    seed = seed_of_next_call()
    rows, longest = 51, 51
    # the kept elements are scaled and rounded once more; a wrong mask changes half of A and is far outside
    bound = tolerance(dtype, longest) + 2 * torch.finfo(dtype).eps
    assert layer.x.numel() == rows * 23
    check(lambda t: stella_linear(*t, SCALE, p), layer, p, seed, bound)


def test_dropout_is_off_in_evaluation_and_draws_nothing() -> None:
    layer = make(CASES[0], torch.float32)
    state = torch.get_rng_state()
    plain = stella_linear(*layer, SCALE)
    assert torch.equal(stella_linear(*layer, SCALE, 0.5, False), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stella_linear(*layer, SCALE, 0.5, True), plain)
    assert not torch.equal(torch.get_rng_state(), state)


def test_dropout_repeats_under_manual_seed_whatever_the_threads() -> None:
    layer = make(Case((300,), 33, 257, 4), torch.float32)
    threads = torch.get_num_threads()
    masks = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            masks.append(KERNELS.philox_dropout(layer.x.detach(), 0.3, torch.tensor(4)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*masks)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(stella_linear(*layer, SCALE, 0.3))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("opaque", [False, True])
def test_checkpoint_is_bitwise_plain_with_dropout(use_reentrant: bool, opaque: bool) -> None:
    layer = make(Case((5, 9), 19, 23, 4), torch.float32)
    grad_y = torch.randn(5, 9, 19)

    def body(x: Tensor) -> Tensor:
        _, W, b, U, S, Vt = layer
        if opaque:
            return stella_adapter(torch.nn.functional.linear(x, W, b), x, U, S, Vt, SCALE, 0.3)
        return stella_linear(x, W, b, U, S, Vt, SCALE, 0.3)

    results = []
    for run in (body, lambda x: checkpoint(body, x, use_reentrant=use_reentrant)):
        for t in (layer.x, layer.U, layer.S, layer.Vt):
            t.grad = None
        torch.manual_seed(8)
        y = run(layer.x)
        y.backward(grad_y)
        results.append([y, *(t.grad for t in (layer.x, layer.U, layer.S, layer.Vt))])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


# What is saved


@pytest.mark.parametrize("run", [run_linear, run_adapter])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward(run: Callable[..., Tensor], p: float, dtype: torch.dtype) -> None:
    """Beyond what is alive already: A, (T, r), and the seed."""
    rows, m, n, r = 24, 50, 40, 3
    x, W, b, U, S, Vt = make(Case((4, 6), m, n, r), dtype)
    alive = {t.untyped_storage().data_ptr() for t in (x, W, b, U, S, Vt)}
    new: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in alive:
            new.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if run is run_linear:
            stella_linear(x, W, b, U, S, Vt, SCALE, p)
        else:
            stella_adapter(torch.nn.functional.linear(x, W, b), x, U, S, Vt, SCALE, p)
    shapes = sorted(tuple(t.shape) for t in new)
    assert shapes == ([()] if p else []) + [(rows, r)]
    assert next(t for t in new if t.dim() == 2).dtype == dtype
    assert max(t.untyped_storage().nbytes() for t in new) == rows * r * dtype.itemsize


def test_no_temporary_of_the_output_size() -> None:
    """The forward of the adapter allocates less than one (T, m) or (T, n) tensor."""
    rows, m, n, r = 256, 512, 384, 4
    x, _, _, U, S, Vt = make(Case((rows,), m, n, r), torch.float32, requires_grad=False)
    y = torch.zeros(rows, m)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        stella_adapter(y, x, U, S, Vt, SCALE)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < rows * n * 4

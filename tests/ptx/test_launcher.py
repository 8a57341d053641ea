"""The native launcher: a layer that it launches gives, bit for bit, what Python's plans give, and it steps aside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stella_kernels.functional import stella_adapter, stella_linear
from stella_kernels.operators import autograd, planned
from tests.ptx import emulator

pytest.importorskip("triton")
launcher: Any = planned.launcher()
if launcher is None:
    pytest.skip("the native launcher is not built", allow_module_level=True)

M, N, R, T = 24, 40, 5, 33
JOINED = ("linear", "linear_backward")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers of CPU tensors as those of a GPU: their operators are Triton's, and the launcher has no plan yet."""
    from stella_kernels.triton_kernels.launch import native as handed
    from stella_kernels.triton_kernels.registration import launch_natively

    operators = emulator.operators()
    launch_natively("CPU")
    if "cpu" not in planned._serving:
        planned.serve("cpu", handed.keep_joined)
    monkeypatch.setattr(autograd, "_adapter_goes_first", lambda x, W: False)
    library = torch.library.Library("stella_kernels", "IMPL")
    with warnings.catch_warnings(), emulator.unkind(emulator.RACES):
        warnings.simplefilter("ignore")  # the CPU's own are replaced, on purpose
        for name in ("adapter_forward_", "adapter_backward_"):
            library.impl(name, operators[name], "CPU", allow_override=True)
            operators[name]._plans.clear()
        launcher.forget()
        yield
    del planned._serving["cpu"]
    library._destroy()


def _made(dtype: torch.dtype, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def _layer(dtype: torch.dtype, rows: tuple[int, ...], bias: bool, p: float) -> list[Any]:
    b = _made(dtype, M) if bias else None
    factors = (_made(torch.float32, *shape, grad=True) for shape in ((M, R), (R, R), (R, N)))
    return [_made(dtype, *rows, N, grad=True), _made(dtype, M, N), b, *factors, 1.3, p]


def _outcome(call: Callable[..., Tensor], arguments: list[Any], grad_y: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    y = call(*arguments)
    trained = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, trained, grad_y)]


def _by_python(call: Callable[..., Tensor], *rest: Any) -> list[Tensor]:
    """The same, launched from Python."""
    serving, planned._serving = planned._serving, {}
    try:
        return _outcome(call, *rest)
    finally:
        planned._serving = serving


def _launched(call: Callable[..., Any], *arguments: Any) -> tuple[Any, bool]:
    """The result, and whether Python's plans were not asked."""
    operators = emulator.operators()
    asked: list[str] = []
    kind = type(operators["adapter_forward_"])
    served = kind.__call__

    def noted(self: Any, *given: Any) -> Any:
        asked.append(self._signature.name)
        return served(self, *given)

    kind.__call__ = noted
    try:
        return call(*arguments), not asked
    finally:
        kind.__call__ = served


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("rows", "bias"), [((T,), True), ((3, 11), False)], ids=str)
def test_a_layer_has_the_bits_of_python(
    native: None, dtype: torch.dtype, p: float, rows: tuple[int, ...], bias: bool
) -> None:
    learned = len(rows)  # a launched layer's output is no view of a matrix, so that its gradient is another kind
    for step in range(learned + 2):
        arguments, grad_y = _layer(dtype, rows, bias, p), _made(dtype, *rows, M)
        wanted = _by_python(stella_linear, arguments, grad_y, step)
        found, native_alone = _launched(_outcome, stella_linear, arguments, grad_y, step)
        assert native_alone == (step >= learned), "the first call of a kind makes its plans"
        for now, before in zip(found, wanted, strict=True):
            assert torch.equal(now, before)
            assert now.shape == before.shape
            assert now.dtype == before.dtype
    assert [launcher.plans(name) for name in JOINED] == [1, learned]


def test_autocast_is_another_kind(native: None) -> None:
    """Its product has another dtype; a weight that backward has to cast is no business of the launcher's."""
    for step in range(3):
        arguments, grad_y = _layer(torch.float32, (T,), True, 0.25), _made(torch.float32, T, M)
        plain = _by_python(stella_linear, arguments, grad_y, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = _by_python(stella_linear, arguments, grad_y.bfloat16(), step)
            found = _outcome(stella_linear, arguments, grad_y.bfloat16(), step)
        assert all(map(torch.equal, found, wanted))
        assert found[0].dtype == torch.bfloat16
        assert all(map(torch.equal, _outcome(stella_linear, arguments, grad_y, step), plain))
    assert [launcher.plans(name) for name in JOINED] == [2, 1]


def test_factors_that_do_not_train_and_inference(native: None) -> None:
    for step in range(3):
        arguments, grad_y = _layer(torch.float32, (T,), True, 0.0), _made(torch.float32, T, M)
        arguments[4].requires_grad_(False)
        arguments[0] = arguments[0].detach()
        wanted = _by_python(stella_linear, arguments, grad_y, step)
        found = _outcome(stella_linear, arguments, grad_y, step)
        assert all(map(torch.equal, found, wanted))
        with torch.no_grad():
            y = stella_linear(*arguments)
        assert torch.equal(y, wanted[0])
        assert not y.requires_grad


def test_the_adapter_of_an_opaque_base(native: None) -> None:
    for step in range(3):
        x, _, _, *rest = _layer(torch.float32, (T,), False, 0.25)
        base = _made(torch.float32, T, M)
        grad_y = _made(torch.float32, T, M)

        def call(*arguments: Any, base: Tensor = base) -> Tensor:
            return stella_adapter(base.clone(), *arguments)

        wanted = _by_python(call, [x, *rest], grad_y, step)
        assert all(map(torch.equal, _outcome(call, [x, *rest], grad_y, step), wanted))
    assert [launcher.plans(name) for name in ("adapter_forward_", "adapter_backward_")] == [1, 1]


def test_other_alignment_is_another_kind(native: None) -> None:
    arguments, grad_y = _layer(torch.float32, (T,), False, 0.0), _made(torch.float32, T, M)
    for step in range(4):
        apart = torch.empty(T * N + 1)[step // 2 :][: T * N].view(T, N).copy_(arguments[0].detach())
        given = [apart.requires_grad_(), *arguments[1:]]
        wanted = _by_python(stella_linear, given, grad_y, step)
        assert all(map(torch.equal, _outcome(stella_linear, given, grad_y, step), wanted))
        assert launcher.plans("linear") == 1 + step // 2


def test_what_is_written_shares_no_memory(native: None) -> None:
    _, _, _, *rest = _layer(torch.float32, (T,), False, 0.0)
    forward = torch.ops.stella_kernels_planned.adapter_forward_
    rest = [t.detach() if isinstance(t, Tensor) else t for t in rest]
    for known in (False, True):
        y, x = _made(torch.float32, T, M), _made(torch.float32, T, N)
        assert bool(forward(y, x, *rest, None)) == known
        if not known:
            torch.ops.stella_kernels.adapter_forward_(y, x, *rest, None)
    both = torch.zeros(T * (M + N) - 8)
    shared = both[: T * M].view(T, M), both[-T * N :].view(T, N)
    assert not forward(*shared, *rest, None)
    with pytest.raises(RuntimeError, match="adapter_forward_: y: found memory that x has as well"):
        planned.adapter_forward_(*shared, *rest, None)


def test_it_steps_aside_for_a_profiler_and_for_deterministic_torch(native: None) -> None:
    import triton

    arguments = _layer(torch.float32, (T,), False, 0.0)
    for _ in range(2):
        stella_linear(*arguments)
    seen: list[object] = []
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        stella_linear(*arguments)
    finally:
        hook.remove(seen.append)
    assert len(seen) >= 2
    assert _launched(stella_linear, *arguments)[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert not _launched(stella_linear, *arguments)[1], "another kind"
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_devices_plan_is_not_used(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and type are words of the kind: what is not on this device has no plan."""
    arguments = _layer(torch.float32, (T,), False, 0.0)
    for _ in range(2):
        stella_linear(*arguments)
    elsewhere = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in arguments]
    planned._serving["meta"] = planned._serving["cpu"]
    try:
        assert stella_linear(*elsewhere).device.type == "meta"
    finally:
        del planned._serving["meta"]


def test_bad_arguments_are_refused_as_ever(native: None) -> None:
    arguments = _layer(torch.float32, (T,), False, 0.0)
    for _ in range(2):
        stella_linear(*arguments)
    for place, wrong, message in (
        (3, arguments[3].detach().mT, "Vt|U"),
        (1, arguments[1].double(), "W: found dtype"),
        (0, arguments[0].detach()[:, :-1], "x: found shape"),
        (5, None, "Vt: found NoneType"),
    ):
        given = [*arguments[:place], wrong, *arguments[place + 1 :]]
        with pytest.raises((TypeError, ValueError), match=message):
            stella_linear(*given)


def test_transforms_and_second_derivatives_are_refused(native: None) -> None:
    arguments = _layer(torch.float32, (T,), False, 0.0)
    for _ in range(2):
        y = stella_linear(*arguments)
    (grad,) = torch.autograd.grad(y.sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.vmap(lambda x: stella_linear(x, *arguments[1:]))(arguments[0].detach()[None])


def test_a_number_is_of_tensors_as_they_are_and_where_they_lie(native: None) -> None:
    memory = torch.zeros(64)
    a, b = memory[:16].view(4, 4), memory[16:32].view(4, 4)
    first = planned.number([a, b])
    assert first > 0
    assert planned.number([memory[:16].view(4, 4), b]) == first
    others = [[b, a], [a], [a, b.mT], [a, memory[16:32].view(2, 8)], [a, memory[17:33].view(4, 4)]]
    others += [[a, b.view(torch.int32)], [a, b, b]]
    assert len({first, *(planned.number(each) for each in others)}) == 1 + len(others)
    for stranger in (torch.eye(4).to_sparse(), torch.empty(4, 4, device="meta")):
        assert planned.number([a, stranger]) == 0


def test_a_step_of_known_tensors_has_the_bits_of_any(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = emulator.operators()["stella_adamw_"]
    factors = [torch.linalg.qr(torch.randn(n, R)).Q.contiguous() for n in (M, N)]
    lists = [factors, *([torch.zeros_like(Y) for Y in factors] for _ in range(3))]
    apart = [[t.clone() for t in each] for each in lists]
    none = [torch.empty(0)] * 2
    numbers: list[int] = []
    real = planned.number
    for step in range(1, 5):
        settings = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, step, 1.0, 1.0]] * 2, dtype=torch.float64)
        if step == 4:  # a gradient elsewhere
            lists[1][0], apart[1][0] = torch.zeros_like(factors[0]), torch.zeros_like(factors[0])
        for mine, other in zip(lists[1], apart[1], strict=True):
            other.copy_(mine.normal_())
        monkeypatch.setattr(planned, "number", lambda tensors: 0)
        wanted = operator(*apart, none, settings)
        monkeypatch.setattr(planned, "number", lambda tensors: numbers.append(real(tensors)) or numbers[-1])
        found = operator(*lists, none, settings)
        assert torch.equal(found, wanted)
        for mine, other in zip(lists, apart, strict=True):
            assert all(map(torch.equal, mine, other))
    assert len(set(numbers[:3])) == 1
    assert numbers[3] != numbers[0] > 0
    bad = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.0, 1.0, 1.0]] * 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="hyperparameters"):
        operator(*lists, none, bad)

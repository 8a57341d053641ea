"""Launch plans: a call of a known kind gives, bit for bit, what the call itself gives, and is refused where it is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ptx import emulator

pytest.importorskip("triton")

M, N, R, T = 24, 40, 5, 33


@pytest.fixture
def planned() -> Iterator[dict[str, Any]]:
    """The adapter's operators without a plan yet, and without noise: a call has the same bits every time."""
    operators = emulator.operators()
    found = {name: operators[name] for name in ("adapter_forward_", "adapter_product", "adapter_backward_")}
    for operator in found.values():
        operator._plans.clear()
    with emulator.unkind(emulator.RACES):
        yield found


def _rows(columns: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    return torch.randn(T * columns + offset).to(dtype)[offset:].view(T, columns)


def _calls(dtype: torch.dtype, p: float, offset: int = 0) -> dict[str, list[Any]]:
    """Fresh arguments of each operator; ``offset`` takes the activations off their alignment."""
    x, y, grad_y, grad_x = (_rows(k, dtype, offset) for k in (N, M, M, N))
    factors = torch.randn(M, R), torch.randn(R, R), torch.randn(R, N)
    seed = torch.tensor(random.getrandbits(40)) if p else None
    return {
        "adapter_forward_": [y, x, *factors, 1.3, p, seed],
        "adapter_product": [x, torch.randn(M).to(dtype), *factors, 1.3, p, seed],
        "adapter_backward_": [grad_x, 0.5, grad_y, x, _rows(R, dtype), *factors, 1.3, p, seed, [True] * 3],
    }


def _outcome(call: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    """What a call returns and what it wrote, of copies of its arguments in memory of the same alignment."""
    result = call(*arguments)
    return [*([result] if isinstance(result, Tensor) else result), *(a for a in arguments if isinstance(a, Tensor))]


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    start = value.storage_offset()
    return torch.empty(value.numel() + start, dtype=value.dtype)[start:].view(value.shape).copy_(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_plan_gives_the_bits_of_the_call(planned: dict[str, Any], dtype: torch.dtype, p: float) -> None:
    for round_, offset in enumerate((0, 0, 0, 3, 3)):
        for name, arguments in _calls(dtype, p, offset).items():
            operator = planned[name]
            alone = [_copied(a) for a in arguments]
            wanted = _outcome(lambda *a, o=operator: o._implementation(o._signature(*a)), alone)
            kinds = len(operator._plans)
            found = _outcome(operator, arguments)
            assert len(operator._plans) - kinds == (round_ in (0, 3)), "a kind is met once"
            assert all(plan is not None for plan in operator._plans.values())
            for now, before in zip(found, wanted, strict=True):
                assert torch.equal(now, before), name


def test_what_a_known_kind_writes_is_still_its_own(planned: dict[str, Any]) -> None:
    """Addresses are no part of the kind: sharing memory is looked for at every call."""
    for _ in range(2):
        planned["adapter_forward_"](*_calls(torch.float32, 0.0)["adapter_forward_"])
    rest = _calls(torch.float32, 0.0)["adapter_forward_"][2:]
    both = torch.zeros(T * (M + N) - 8)
    with pytest.raises(RuntimeError, match="adapter_forward_: y: found memory that x has as well"):
        planned["adapter_forward_"](both[: T * M].view(T, M), both[-T * N :].view(T, N), *rest)
    # two arguments that are only read may be one: the call itself serves them
    arguments = _calls(torch.float32, 0.0)["adapter_backward_"]
    planned["adapter_backward_"](*arguments)
    square = [torch.randn(T, R), 0.0, torch.randn(T, R), None, torch.randn(T, R), *torch.randn(3, R, R), 1.0, 0.0, None]
    square[3] = square[2]
    for shared in (True, False, True):
        if not shared:
            square[3] = torch.randn(T, R)
        operator = planned["adapter_backward_"]
        wanted = operator._implementation(operator._signature(*map(_copied, square), [True] * 3))
        for now, before in zip(operator(*square, [True] * 3), wanted, strict=True):
            assert torch.equal(now, before)
        square[3] = square[2]


def test_a_profiler_sees_every_launch(planned: dict[str, Any]) -> None:
    import triton

    for _ in range(2):
        planned["adapter_forward_"](*_calls(torch.float32, 0.0)["adapter_forward_"])
    seen: list[object] = []
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        planned["adapter_forward_"](*_calls(torch.float32, 0.0)["adapter_forward_"])
    finally:
        hook.remove(seen.append)
    assert len(seen) == len(next(iter(planned["adapter_forward_"]._plans.values())).launches)
    planned["adapter_forward_"](*_calls(torch.float32, 0.0)["adapter_forward_"])
    assert len(seen) == len(next(iter(planned["adapter_forward_"]._plans.values())).launches)


def test_threads_do_not_mix_their_plans(planned: dict[str, Any]) -> None:
    failures: list[str] = []

    def work(rank: int) -> None:
        for _ in range(3):
            arguments = _calls(torch.float32, 0.0)["adapter_forward_"]
            y, x, U, S, Vt, scale, *_ = arguments
            wanted = y.double() + scale * (x.double() @ Vt.double().mT) @ S.double().mT @ U.double().mT
            planned["adapter_forward_"](*arguments)
            if (y - wanted).norm() > 1e-5 * wanted.norm():
                failures.append(f"thread {rank}")

    threads = [Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_batches_of_any_length_are_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 lengths, those that need one kernel more or less; T, and what follows from it, is no constant of them."""
    from triton.runtime.jit import JITFunction

    compiled: Counter[str] = Counter()
    made: list[tuple[dict[Any, Any], Any]] = []

    class Nothing:
        function, packed_metadata = 0, ()

        def launch_metadata(self, *_: Any) -> None: ...

        def run(self, *_: Any) -> None: ...

    def compile_nothing(kernel: Any, key: Any, signature: Any, device: int, *_: Any) -> Nothing:
        compiled[kernel.fn.__name__] += 1
        kernel.device_caches[device][0][key] = nothing = Nothing()
        made.append((kernel.device_caches[device][0], key))
        return nothing

    operators = emulator.operators()
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    for name in ("adapter_forward_", "adapter_backward_"):
        monkeypatch.setattr(operators[name], "_plans", {})
    try:
        m, n, r, dtype = 1536, 592, 16, torch.bfloat16
        factors = torch.randn(m, r), torch.randn(r, r), torch.randn(r, n)
        lengths = random.Random(0)
        for step in range(200):
            if step == 40:
                early = sum(compiled.values())
            T = 1 if step == 100 else lengths.randint(64, 2048)
            x, y, grad_y, grad_x = (torch.empty(T, k, dtype=dtype) for k in (n, m, m, n))
            A = operators["adapter_forward_"](y, x, *factors, 1.0, 0.0, None)
            operators["adapter_backward_"](grad_x, 1.0, grad_y, x, A, *factors, 1.0, 0.0, None, [True] * 3)
    finally:
        for cache, key in made:  # other tests launch for good
            del cache[key]
    assert sum(compiled.values()) == early <= 9, compiled

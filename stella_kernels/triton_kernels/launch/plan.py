"""Launch plans: what a call of an operator launched is kept by the kind of the call, and launched again as it was.

Of a call of a known kind only addresses differ, so that nothing is checked, computed or looked up again: results and
one piece of scratch are allocated, addresses are put in their places, and compiled kernels are launched. The kind is
all that a launch depends on: shapes, strides and dtypes of the tensors, which of them are aligned to 16 bytes (Triton
specialises on that), the other arguments, the device, and whether torch is to be deterministic.

Where Triton's launch hooks are set, for a profiler, every call goes the long way. Its knobs for debugging are those of
a kind's first call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import triton
from torch import Tensor

from ...operators.memory import extent
from ...operators.signatures import Signature
from . import native
from .device import capturing, target_backend
from .recorded import ARGUMENT, RESULT, SCRATCH, Launch, Plan

_MOST = 4096  # plans of an operator: a batch of another length is another kind
_ALIGNMENT = 256  # of scratch, bytes: as torch's own on a GPU, at least

_state = threading.local()


class _Recorder:
    """Of one call: its launches, and the scratch it allocated, held so that no address comes up twice."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        self.scratch: list[Tensor] = []


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """``kernel[grid](*arguments, **named)``, noted where a plan is being made."""
    compiled = kernel[grid](*arguments, **named)
    recorder: _Recorder | None = getattr(_state, "recorder", None)
    if recorder is not None:
        names = kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | {name: named[name] for name in named if name in names}
        recorder.launches.append((compiled, grid, [given[name] for name in names]))


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for one call, whether or not it becomes a result."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    recorder: _Recorder | None = getattr(_state, "recorder", None)
    if recorder is not None:
        recorder.scratch.append(memory)
    return memory


@contextmanager
def unrecorded() -> Iterator[None]:
    """Launches that are no part of the call: measurements."""
    before, _state.recorder = getattr(_state, "recorder", None), None
    try:
        yield
    finally:
        _state.recorder = before


class Planned:
    """An operator by its signature, called with its arguments one by one: the plan of the kind of call, or the call."""

    def __init__(self, signature: type[Signature], implementation: Callable[[Any], Any]) -> None:
        types = signature.arguments()
        written = {each.name: bool(each.metadata.get("written")) for each in fields(signature)}  # type: ignore[arg-type]
        self._signature = signature
        self._implementation = implementation
        self._tensors = [i for i, kind in enumerate(types.values()) if kind.startswith("Tensor")]
        self._lists = [i for i, kind in enumerate(types.values()) if kind.startswith("list")]
        self._numbers = [i for i, kind in enumerate(types.values()) if not kind.startswith(("Tensor", "list"))]
        tensors = [name for name, kind in types.items() if kind.startswith("Tensor")]
        self._written = [k for k, name in enumerate(tensors) if written[name]]
        self._plans: dict[tuple[Any, ...], Plan | None] = {}
        assert not any(kind == "list[Tensor]" for kind in types.values())

    def __call__(self, *arguments: Any) -> Any:
        # Interpreted, nothing is launched; inside another operator, its launches are that one's.
        if target_backend() == "interpreter" or getattr(_state, "recorder", None) is not None:
            return self._implementation(self._signature(*arguments))
        device = -1
        addresses: list[int] = []
        kind: list[Any] = [arguments[i] for i in self._numbers]
        for i in self._lists:
            kind += arguments[i]
        for i in self._tensors:
            tensor = arguments[i]
            if tensor is None:
                addresses.append(0)
                kind.append(None)
            else:
                address = tensor.data_ptr()
                addresses.append(address)
                device = tensor.get_device()
                kind += (address & 15, tensor.shape, tensor.stride(), tensor.dtype, device)
        kind.append(torch.are_deterministic_algorithms_enabled())
        key = tuple(kind)
        plan = self._plans.get(key)
        if plan is not None and self._apart(plan, addresses) and not _hooks():
            native.last.plan = plan
            native.keep(self._signature.name, plan)  # a process's first call comes before anything keeps plans
            if device < 0 or device == torch.cuda.current_device():
                return _replayed(plan, addresses)
            with torch.cuda.device(device):
                return _replayed(plan, addresses)
        native.last.plan = None
        if key in self._plans:
            return self._implementation(self._signature(*arguments))
        return self._first(key, arguments, addresses)

    def _apart(self, plan: Plan, addresses: list[int]) -> bool:
        """Whether what is written shares no memory with anything: what is left of the checks for a known kind."""
        extents = plan.extents
        for written in self._written:
            begin = addresses[written]
            end = begin + extents[written]
            for i, address in enumerate(addresses):
                if address < end and begin < address + extents[i] and i != written:
                    return False
        return True

    def _first(self, key: tuple[Any, ...], arguments: tuple[Any, ...], addresses: list[int]) -> Any:
        """The call itself; where nothing else than launches came of it, its plan is kept."""
        _state.recorder = recorder = _Recorder()
        native.recording(True)
        try:
            result = self._implementation(self._signature(*arguments))
        finally:
            _state.recorder = None
            native.recording(False)
        tensors = [arguments[i] for i in self._tensors]
        here = next(t for t in tensors if t is not None).device
        if capturing(here):
            return result  # what was not measured before cannot be now: another call may choose better
        if len(self._plans) >= _MOST:
            self._plans.clear()
        plan = self._plans[key] = _plan_of(recorder, tensors, addresses, result)
        if plan is not None:
            native.last.plan = plan
            native.keep(self._signature.name, plan)
        return result


def _hooks() -> bool:
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _plan_of(recorder: _Recorder, tensors: list[Tensor | None], addresses: list[int], result: Any) -> Plan | None:
    """None where a launch has an address that is none of the arguments', the results' or the scratch's."""
    results: list[Tensor] = [result] if isinstance(result, Tensor) else list(result)
    found: dict[int, tuple[int, int]] = {}
    for i, (address, tensor) in enumerate(zip(addresses, tensors, strict=True)):
        if tensor is not None and tensor.numel():
            if address in found:
                return None  # two arguments in one place: another call of this kind may have them apart
            found[address] = (ARGUMENT, i)
    for i, each in enumerate(results):
        if each.numel():
            found[each.data_ptr()] = (RESULT, i)
    if not recorder.launches or not all(each.is_contiguous() for each in results):
        return None
    total = 0
    for memory in recorder.scratch:
        if memory.numel() and memory.data_ptr() not in found:
            found[memory.data_ptr()] = (SCRATCH, total)
            total += -(-memory.nbytes // _ALIGNMENT) * _ALIGNMENT
    launches = []
    for compiled, grid, given in recorder.launches:
        values: list[Any] = []
        places: list[tuple[int, int, int]] = []
        for position, value in enumerate(given):
            if isinstance(value, Tensor):
                if value.numel():
                    if value.data_ptr() not in found:
                        return None
                    places.append((position, *found[value.data_ptr()]))
                value = 0
            values.append(value)
        x, y, z, *_ = (*grid, 1, 1)
        steps = compiled.run, (x, y, z), compiled.function, compiled.packed_metadata
        launches.append(Launch(compiled, *steps, values, places))
    extents = [extent(t) * t.element_size() if t is not None and t.numel() else 0 for t in tensors]
    kinds = [(each.shape, each.stride(), each.dtype) for each in results]
    return Plan(launches, kinds, total, isinstance(result, Tensor), extents, results[0].device)


def _replayed(plan: Plan, addresses: list[int]) -> Any:
    """The launches of a plan with these addresses on the current device, and its results."""
    device = plan.device
    # half the time of torch.empty
    results = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in plan.results]
    made = [result.data_ptr() for result in results]
    base = 0
    if plan.scratch:
        memory = torch.empty_strided((plan.scratch,), (1,), dtype=torch.uint8, device=device)
        base = memory.data_ptr()
    stream = triton.runtime.driver.active.get_current_stream(device.index or 0)
    for step in plan.launches:
        values = step.values.copy()
        for position, source, which in step.places:
            values[position] = (
                addresses[which] if source == ARGUMENT else made[which] if source == RESULT else base + which
            )
        step.run(*step.grid, stream, step.function, step.metadata, None, None, None, *values)
    return results[0] if plan.single else tuple(results)

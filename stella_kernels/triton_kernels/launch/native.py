"""Plans handed to the native module ``_launcher``, which launches them without Python (``operators/planned.py``).

Only what is certain is handed over: a kernel whose PTX declares the parameters that its signature says, and that asks
for nothing but a grid, threads and shared memory. Triton's own launcher serves every other.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import triton

from ...operators import planned
from ...operators.signatures import Signature
from .device import target_backend
from .recorded import ARGUMENT, Launch, Plan

# By Triton's types: how PTX declares a parameter of the type, and how its bytes are packed. Pointers are *.
_FORMATS = {"i1": ("8", "<b"), "i8": ("8", "<b"), "i16": ("16", "<h"), "i32": ("32", "<i"), "i64": ("64", "<q")}
_FORMATS |= {"u1": ("8", "<B"), "u8": ("8", "<B"), "u16": ("16", "<H"), "u32": ("32", "<I"), "u64": ("64", "<Q")}
_FORMATS |= {"fp32": ("32", "<f"), "fp64": ("64", "<d"), "*": ("64", "<Q")}
_MOST_SCRATCH = 2  # parameters that Triton adds for scratch of its own, which no kernel of ours asks for

last = threading.local()  # the plan that a thread's last call went by

_module: Any = None  # while it serves
_loaded: dict[object, object] = {}  # kernels by their handles, which hold only as long as Triton's objects do


def enable(key: str) -> None:
    """Have the planned operators implemented under a dispatch key of torch, where that can be. Once in a process."""
    global _module
    found = planned.launcher()
    if found is None or _module is not None or target_backend() != "cuda":
        return
    operators = [(signature.name, _kinds(signature)) for signature in planned.OPERATORS]
    runtime, stream = triton.knobs.runtime, triton.runtime.driver.active.get_current_stream
    deterministic = torch._C._get_deterministic_algorithms
    device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
    device_type = key.lower()
    autocast = partial(torch.is_autocast_enabled, device_type), partial(torch.get_autocast_dtype, device_type)
    if found.enable(planned.NAMESPACE, key, operators, runtime, deterministic, *autocast, device, stream):
        _module = found
        planned.serve(device_type, keep_joined)


def recording(on: bool) -> None:
    """Whether this thread makes a plan, so that launches are to go through Python, which notes them."""
    if _module is not None:
        _module.recording(on)


def keep(name: str, plan: Plan, places: Sequence[int] | None = None, accumulated: str = "") -> None:
    """For the kind of call that the native operator of this name has just been asked for, in this thread.

    Args:
        places: where the native operator has the tensors of the plan's, in that one's order.
        accumulated: dtype of the base product that the native operator makes.
    """
    if _module is None or not _module.missed(name):
        return
    if plan.handed is None:
        launches = [_described(step) for step in plan.launches]
        plan.handed = [] if None in launches else launches
    if plan.handed:
        _loaded.update((step.function, step.compiled) for step in plan.launches)
        results = [(list(shape), list(strides), str(dtype)) for shape, strides, dtype in plan.results]
        launches = plan.handed if places is None else [_moved(launch, places) for launch in plan.handed]
        _module.keep(name, launches, results, plan.scratch, plan.extents, accumulated)


def keep_joined(name: str, places: Sequence[int], accumulated: torch.dtype) -> None:
    """The plan that the last call of this thread went by, for an operator that makes the base's product as well."""
    if (plan := getattr(last, "plan", None)) is not None:
        keep(name, plan, places, str(accumulated))


def _moved(launch: Any, where: Sequence[int]) -> tuple[Any, ...]:
    *fixed, places = launch
    return *fixed, [(at, source, where[which] if source == ARGUMENT else which) for at, source, which in places]


def _kinds(signature: type[Signature]) -> str:
    """A letter for each argument, as ``csrc/launch/plans.h`` reads them."""
    letters = {"Tensor": "T", "Tensor | None": "t", "float": "f", "bool": "b", "list[bool]": "l"}
    written = {"T": "W", "t": "w"}
    found = [(letters[str(each.type)], each.metadata.get("written")) for each in fields(signature)]  # type: ignore[arg-type]
    return "".join(written[letter] if is_written else letter for letter, is_written in found)


def _described(step: Launch) -> tuple[Any, ...] | None:
    """Function, grid, threads, bytes of shared memory, values of the parameters, and the places of addresses."""
    compiled = step.compiled
    metadata = compiled.metadata
    plain = metadata.num_ctas == 1 and not any(
        getattr(metadata, asked, False)
        for asked in ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    )
    if not plain or getattr(compiled.run, "gsan_enabled", False):
        return None
    declared = _declared(compiled.asm["ptx"])
    types = list(compiled.src.signature.values())
    values: list[bytes] = []
    position_of: dict[int, int] = {}
    for position, (kind, value) in enumerate(zip(types, step.values, strict=True)):
        if kind == "constexpr":
            continue
        known = _FORMATS.get("*" if str(kind).startswith("*") else str(kind))
        if known is None or len(values) >= len(declared) or declared[len(values)] != known[0]:
            return None
        position_of[position] = len(values)
        values.append(struct.pack(known[1], value))
    added = declared[len(values) :]
    if len(added) > _MOST_SCRATCH or any(bits != "64" for bits in added):
        return None
    values += [bytes(8)] * len(added)
    # an address that the kernel was specialised on is no parameter
    places = [(position_of[at], source, which) for at, source, which in step.places if at in position_of]
    return step.function, list(step.grid), 32 * metadata.num_warps, metadata.shared, values, places


def _declared(ptx: str) -> list[str]:
    """Bits of each parameter of the one kernel."""
    header = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    return re.findall(r"\.param\s+\.[a-z](\d+)", header.group(1)) if header else []

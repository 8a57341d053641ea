"""Where the GPU waits for the host: the time to launch a layer and a step, and the gaps between kernels in training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.adapter import layer
from bench.gpu.setting import Setting, attempt
from bench.gpu.training import ADAPTERS, problem_on, training_step
from bench.stiefel.model import OPTIMIZERS, copies, llama_factors

CASE = layer.Case(64, 1536, 576, 16, 0.05, torch.bfloat16)  # so few rows that what is seen is the host
TOY = layer.Case(8, 12, 16, 4, 0.05)
ROUNDS, STEPS = 30, 3


def run(setting: Setting) -> None:
    """Host time of the parts, then the gaps of the whole."""
    device = setting.device
    attempt(setting, "host time of a layer", lambda: _layer(setting, device))
    attempt(setting, "host time of an optimizer step", lambda: _step(setting, device))
    problem = problem_on(device, setting.rehearse)
    for name in ADAPTERS:
        if setting.left < 4:
            setting.missing(f"gaps of a training step with {name}: no time left")
            continue
        attempt(
            setting, f"gaps, {name}", lambda name=name: _gaps(setting, name, training_step(name, "eager", 0.0, problem))
        )


def _issue_seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds in which a call returns, and in which the GPU is done with it, both from an idle GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = perf_counter()
    run()
    returned = perf_counter()
    wait()
    return returned - begin, perf_counter() - begin


def _host_times(setting: Setting, what: str, candidates: dict[str, Callable[[], object]]) -> None:
    rounds = 2 if setting.rehearse else ROUNDS
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for done in range(-3 if not setting.rehearse else -1, rounds):
        for name, call in candidates.items():
            seconds = _issue_seconds(call, setting.device)
            if done >= 0:
                taken[name].append(seconds)
    for name, pairs in taken.items():
        host, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
        setting.record("host", what=what, candidate=name, host_seconds=host, whole_seconds=whole)
        print(f"{what}: {name:<14} returns after {1e6 * host:9.1f} us, done after {1e6 * whole:9.1f} us", flush=True)


def _layer(setting: Setting, device: torch.device) -> None:
    case = TOY if setting.rehearse else CASE
    given = layer.problem(case, device=device)
    calls = {name: (lambda name=name: given.step(name)) for name in given.layers}
    _host_times(setting, f"layer, forward and backward, {case.name}", calls)


def _step(setting: Setting, device: torch.device) -> None:
    layers, r = (1, 4) if setting.rehearse else (32, 8)
    factors = llama_factors(layers, r, torch.Generator().manual_seed(r), device)
    optimizers: dict[str, Any] = {
        name: OPTIMIZERS[name](copies(factors)) for name in ("adamw", "stella_adamw", "attach")
    }
    what = f"optimizer step, {len(factors)} factors, r = {r}"
    _host_times(setting, what, {name: optimizer.step for name, optimizer in optimizers.items()})


def _gaps(setting: Setting, name: str, step: Callable[[], object]) -> None:
    """By the profiler: how long kernels run, and how long none does, from the first to the end of the last."""
    gpu = setting.device.type == "cuda"
    for _ in range(1 if setting.rehearse else 3):
        step()
    plain = statistics.median(_issue_seconds(step, setting.device)[1] for _ in range(STEPS))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    events = [
        e for e in profiled.events()
        if e.device_type == kind and e.time_range.end > e.time_range.start
        # ranges that somebody named, as optimizers do, are no kernels
        and not getattr(e, "is_user_annotation", False) and not e.name.startswith(("Optimizer.", "ProfilerStep"))
    ]  # fmt: skip
    # of a CPU's operations, those that are in no other one: they stand in for kernels
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if gpu or e.cpu_parent is None)
    if not spans:
        setting.missing(f"gaps, {name}: the profiler shows no kernel (may it not read the GPU's counters?)")
        return
    busy, gaps = busy_and_gaps(spans)
    whole = busy + sum(gaps)
    setting.record(
        "gaps", candidate=name, kernels=len(spans) / STEPS, busy_seconds=1e-6 * busy / STEPS,
        idle_seconds=1e-6 * sum(gaps) / STEPS, idle=sum(gaps) / whole, unprofiled_seconds=plain,
        longest_gaps_us=sorted(gaps, reverse=True)[:5],
    )  # fmt: skip
    print(
        f"{name}: {len(spans) / STEPS:.0f} kernels a step, busy {1e-3 * busy / STEPS:.2f} ms, idle between them "
        f"{1e-3 * sum(gaps) / STEPS:.2f} ms ({sum(gaps) / whole:.0%}); unprofiled step {1e3 * plain:.2f} ms",
        flush=True,
    )


def busy_and_gaps(spans: Sequence[tuple[float, float]]) -> tuple[float, list[float]]:
    """Of intervals in order of their beginning: how long any of them lasts, and the gaps in which none does."""
    busy, gaps, until = 0.0, [], spans[0][0]
    for begin, end in spans:
        if begin > until:
            gaps.append(begin - until)
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy, gaps

"""The device of a bench run: found or refused, its clock, its memory, what it says of itself."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.common import device
from stella_kernels.operators import backends
from tests.bench.pretended_gpu import GPU

ROOT = Path(__file__).parents[2]


def test_a_gpu_is_timed_by_events_from_an_idle_stream_with_its_cache_written_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    stream = SimpleNamespace(synchronize=lambda: happened.append("idle"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda wanted: stream)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda wanted: SimpleNamespace(L2_cache_size=50 * 2**20))
    made = torch.empty
    other = SimpleNamespace(zero_=lambda: happened.append("cache"))
    monkeypatch.setattr(torch, "empty", lambda size, **named: happened.append(f"{size}") or other)
    clock = device.clock_of(GPU)
    monkeypatch.setattr(torch, "empty", made)
    assert int(happened.pop()) >= 2 * 50 * 2**20
    assert clock(lambda: happened.append("run")) == 0.25
    assert happened == ["cache", "idle", "record", "run", "record", "wait"]


def test_memory_of_a_gpu_is_what_its_allocator_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 1000, "most": 5000}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda wanted: held.update(most=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda wanted: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda wanted: held["most"])
    assert device.measures_memory(GPU)
    assert device.peak_bytes(GPU, lambda: held.update(most=1700)) == 700


def test_garbage_is_no_part_of_the_memory_before_a_call_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 1000}

    class Cycle:
        def __init__(self) -> None:
            self.self = self

        def __del__(self) -> None:
            held["now"] = 400

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda wanted: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda wanted: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda wanted: 1700)
    Cycle()
    assert device.peak_bytes(GPU, lambda: None) == 1300


@pytest.mark.skipif(not device.measures_memory(device.CPU), reason="Linux alone tells")
def test_memory_of_a_cpu_is_the_rise_of_what_is_resident() -> None:
    size = 64 * 2**20
    # pages of the process itself come and go beside it
    assert device.peak_bytes(device.CPU, lambda: torch.ones(size // 4)) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    ("asked", "cuda", "gpus", "message"),
    [
        ("quda", "13.0", 1, "--device quda: not a device; wanted cpu, cuda or cuda:INDEX"),
        ("meta", "13.0", 1, "--device meta: the kernels serve cpu and cuda alone"),
        ("cuda", None, 0, "is built for the CPU alone; install a build for your GPU"),
        ("cuda", "13.0", 0, "finds no GPU; see whether nvidia-smi"),
        ("cuda:2", "13.0", 2, r"--device cuda:2: there is no such GPU; found cuda:0 \(GPU 0\), cuda:1 \(GPU 1\)"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(
    monkeypatch: pytest.MonkeyPatch, asked: str, cuda: str | None, gpus: int, message: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    with pytest.raises(device.DeviceUnavailableError, match=message):
        device.named(asked)


@pytest.mark.parametrize(("asked", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_there_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch, asked: str, index: int) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert device.named(asked) == torch.device("cuda", index)
    assert current == [index]
    assert torch.get_float32_matmul_precision() == "highest"
    assert device.named("cpu") == device.CPU


def test_a_gpu_without_kernels_is_an_error_unless_the_reference_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_why_not", lambda: "Triton is not installed; pip install triton")
    monkeypatch.delenv("STELLA_KERNELS_BACKEND", raising=False)
    wanted = "--device cuda:0: Triton's kernels do not serve: .*; pip install triton, or .*BACKEND=reference"
    with pytest.raises(device.DeviceUnavailableError, match=wanted):
        device.served(GPU)
    assert device.served(device.CPU).startswith("polar by ")
    monkeypatch.setenv("STELLA_KERNELS_BACKEND", "reference")
    every = "polar by reference, stella_adamw_ by reference, adapter_forward_ by reference"
    assert device.served(GPU) == every
    monkeypatch.delenv("STELLA_KERNELS_BACKEND")
    monkeypatch.setattr(backends, "triton_why_not", str)
    assert device.served(GPU) == every.replace("reference", "triton")


@pytest.mark.parametrize(
    ("hip", "capability", "three"),
    [(None, (8, 0), True), (None, (9, 0), True), (None, (7, 5), False), ("7", (9, 4), False)],
)
def test_a_gpu_says_how_its_float32_products_are_made(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int], three: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda wanted: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda wanted: "a GPU")
    assert device.description(GPU) == "a GPU" + " (a float32 product is three of tf32)" * three
    assert not device.three_of_tf32(device.CPU)


def test_the_command_line_says_so_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "polar", "--device", "quda"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--device quda: not a device" in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library takes no such wish")
def test_memory_once_given_is_kept() -> None:
    code = """
import torch
from bench.common.device import _resident, keep_memory
assert keep_memory()
before = _resident("VmRSS")
for _ in range(2):
    torch.ones(16 * 2**20)
    assert _resident("VmRSS") - before > 60 * 2**20
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

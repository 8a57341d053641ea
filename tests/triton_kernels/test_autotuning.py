"""Which configuration runs: what is measured, what is remembered, and what never stops a kernel from running."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from stella_kernels.triton_kernels.launch import autotuning

CPU = torch.device("cpu")
DEFAULT, FAST, SLOW = "default", "fast", "slow"
TIMES = {DEFAULT: 2.0, FAST: 1.0, SLOW: 3.0}


class Tuner:
    """Calls ``chosen`` as a kernel would, under a clock that knows beforehand how long each candidate takes."""

    def __init__(self) -> None:
        self.times = dict(TIMES)
        self.ran: list[str] = []

    def run(self, candidate: str) -> None:
        self.ran.append(candidate)

    def clock(self, call: Callable[[], None]) -> float:
        call()
        return self.times[self.ran[-1]]

    def __call__(
        self,
        kernel: str = "kernel",
        shape_class: tuple[object, ...] = (16,),
        candidates: tuple[str, ...] = (FAST, SLOW),
    ) -> str:
        self.ran.clear()
        return autotuning.chosen(kernel, shape_class, candidates, DEFAULT, self.run, CPU, self.clock)


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuner]:
    monkeypatch.setenv("STELLA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("STELLA_KERNELS_AUTOTUNE", raising=False)
    autotuning._known.clear()
    yield Tuner()
    autotuning._known.clear()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def new_process() -> None:
    autotuning._known.clear()


def test_the_fastest_is_measured_once_and_remembered(tuner: Tuner, tmp_path: Path) -> None:
    assert tuner() == FAST
    assert tuner.ran == [DEFAULT, FAST, SLOW]
    assert tuner() == FAST
    assert tuner.ran == []
    new_process()
    tuner.times[SLOW] = 0.1  # what is on disk counts, and is not measured again
    assert tuner() == FAST
    assert tuner.ran == []
    (written,) = files(tmp_path)
    record = json.loads(written.read_text())
    assert record["choice"] == repr(FAST)
    assert record["times"] == ["2.0", "1.0", "3.0"]


def test_another_key_is_another_measurement(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner()
    changes = (
        lambda: tuner(kernel="another"),
        lambda: tuner(shape_class=(32,)),
        lambda: tuner(candidates=(FAST,)),
    )
    for change in changes:
        new_process()
        assert change() == FAST
        assert tuner.ran
    for name, value in (("__version__", "0.0.0"), ("source_hash", lambda: "another")):
        new_process()
        monkeypatch.setattr(autotuning, name, value)
        assert tuner() == FAST
        assert tuner.ran, name
    assert len(files(tmp_path)) == 6


def test_the_key_tells_device_driver_versions_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = {"device": "a GPU", "architecture": "9.0", "driver": "580.1", "runtime": "13.0"}
    monkeypatch.setattr(autotuning, "device_identity", lambda device: identity)
    key = autotuning._key("kernel", (16, torch.float32), ["a"], torch.device("cuda", 0))
    assert set(identity.items()) < {(name, value) for name, value in key.items() if isinstance(value, str)}
    assert {"kernel", "shape class", "candidates", "stella_kernels", "torch", "triton", "source"} < set(key)
    assert key["torch"] == torch.__version__
    assert len(key["source"]) == 64
    assert json.loads(json.dumps(key)) == key


def test_a_hair_faster_is_not_worth_leaving_the_default_for(tuner: Tuner) -> None:
    tuner.times = {DEFAULT: 1.0, FAST: 0.99, SLOW: 1.0}
    assert tuner() == DEFAULT


def test_the_default_alone_is_not_measured_against_anything(tuner: Tuner) -> None:
    assert tuner(candidates=()) == DEFAULT


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"key": {}, "choice": "fast"}'])
def test_a_corrupt_file_is_measured_again_and_replaced(tuner: Tuner, tmp_path: Path, content: bytes) -> None:
    tuner()
    (written,) = files(tmp_path)
    whole = written.read_bytes()
    written.write_bytes(content)
    new_process()
    assert tuner() == FAST
    assert tuner.ran == [DEFAULT, FAST, SLOW]
    assert written.read_bytes() == whole
    assert files(tmp_path) == [written]


def test_a_choice_that_is_no_candidate_is_measured_again(tuner: Tuner, tmp_path: Path) -> None:
    tuner()
    (written,) = files(tmp_path)
    written.write_text(json.dumps(json.loads(written.read_text()) | {"choice": "'gone'"}))
    new_process()
    assert tuner() == FAST
    assert tuner.ran


def test_a_folder_that_cannot_be_written_costs_a_measurement(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STELLA_KERNELS_CACHE", str(tmp_path / "file"))  # no folder can be made below a file
    assert tuner() == FAST
    assert tuner() == FAST
    assert tuner.ran == []  # this process knows
    new_process()
    assert tuner() == FAST
    assert tuner.ran
    assert files(tmp_path) == [tmp_path / "file"]


def test_without_links_the_file_is_still_written_whole(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(autotuning.os, "link", refuse)
    assert tuner() == FAST
    (written,) = files(tmp_path)
    assert json.loads(written.read_text())["choice"] == repr(FAST)


def test_the_first_of_two_processes_decides(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second measured otherwise meanwhile, and takes what the first has written."""
    tuner()
    (written,) = files(tmp_path)
    new_process()
    tuner.times = {DEFAULT: 3.0, FAST: 2.0, SLOW: 1.0}
    read, seen = autotuning._read, []

    def not_there_yet(path: Path, parts: dict[str, object]) -> int | None:
        seen.append(path)
        return None if len(seen) == 1 else read(path, parts)

    monkeypatch.setattr(autotuning, "_read", not_there_yet)
    assert tuner() == FAST
    assert tuner.ran == [DEFAULT, FAST, SLOW]
    assert files(tmp_path) == [written]


PROCESS = """
import sys, time, torch
from stella_kernels.triton_kernels.launch import autotuning
mine = sys.argv[1]
ran = []
def clock(call):
    call()
    time.sleep(0.3)
    return {"default": 2.0, mine: 1.0}.get(ran[-1], 3.0)
print(autotuning.chosen("kernel", (16,), ("a", "b", "c", "d"), "default", ran.append, torch.device("cpu"), clock))
"""


def test_processes_at_the_same_time_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would choose another; they measure for more than a second and start together."""
    monkeypatch.setenv("STELLA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("STELLA_KERNELS_AUTOTUNE", raising=False)
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    answers = {process.communicate(timeout=300)[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(answers) == 1
    assert answers < {"a", "b"}
    assert len(files(tmp_path)) == 1


def test_switched_off_takes_the_default(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner()
    new_process()
    monkeypatch.setenv("STELLA_KERNELS_AUTOTUNE", "0")
    assert tuner() == DEFAULT
    assert tuner.ran == []
    monkeypatch.setenv("STELLA_KERNELS_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="STELLA_KERNELS_AUTOTUNE: found 'yes', wanted one of '0', '1'"):
        tuner()


def test_deterministic_algorithms_take_the_default(tuner: Tuner) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert tuner() == DEFAULT
    finally:
        torch.use_deterministic_algorithms(False)
    assert tuner.ran == []
    assert tuner() == FAST


def test_while_a_graph_is_captured_nothing_is_measured(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotuning, "capturing", lambda device: True)
    assert tuner() == DEFAULT
    assert tuner.ran == []
    monkeypatch.setattr(autotuning, "capturing", lambda device: False)
    assert tuner() == FAST  # the default was for that call alone
    monkeypatch.setattr(autotuning, "capturing", lambda device: True)
    assert tuner() == FAST  # known by now
    new_process()
    assert tuner() == FAST  # a file can be read while a graph is captured
    assert tuner.ran == []


def test_on_the_cpu_the_interpreter_takes_the_default(tuner: Tuner) -> None:
    assert autotuning.chosen("kernel", (16,), (FAST,), DEFAULT, tuner.run, CPU) == DEFAULT
    assert tuner.ran == []


def test_a_candidate_that_does_not_fit_is_passed_over(tuner: Tuner) -> None:
    def clock(call: Callable[[], None]) -> float:
        call()
        if tuner.ran[-1] != SLOW:
            raise OutOfResources(300000, 232448, "shared memory")
        return 9.0

    assert autotuning.chosen("kernel", (16,), (FAST, SLOW), DEFAULT, tuner.run, CPU, clock) == SLOW


def test_a_candidate_that_a_pass_of_the_compiler_fails_on_is_passed_over(tuner: Tuner) -> None:
    def clock(call: Callable[[], None]) -> float:
        call()
        if tuner.ran[-1] == FAST:
            raise RuntimeError("PassManager::run failed")
        return tuner.times[tuner.ran[-1]]

    assert autotuning.chosen("kernel", (16,), (FAST, SLOW), DEFAULT, tuner.run, CPU, clock) == DEFAULT


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_without_memory_to_measure_in_the_default_runs(tuner: Tuner, tmp_path: Path, error: RuntimeError) -> None:
    def clock(call: Callable[[], None]) -> float:
        tuner.run(DEFAULT)
        raise error

    assert autotuning.chosen("kernel", (16,), (FAST, SLOW), DEFAULT, tuner.run, CPU, clock) == DEFAULT
    assert tuner.ran == [DEFAULT]
    assert files(tmp_path) == []


def test_an_error_of_the_kernel_itself_is_not_hidden(tuner: Tuner) -> None:
    def clock(call: Callable[[], None]) -> float:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotuning.chosen("kernel", (16,), (FAST,), DEFAULT, tuner.run, CPU, clock)


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STELLA_KERNELS_CACHE", raising=False)
    for value, wanted in (
        (None, tmp_path / "home/.cache/stella_kernels"),
        ("", tmp_path / "home/.cache/stella_kernels"),
        ("relative", tmp_path / "home/.cache/stella_kernels"),
        (str(tmp_path / "xdg"), tmp_path / "xdg/stella_kernels"),
    ):
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert autotuning.cache_folder() == wanted
    monkeypatch.setenv("STELLA_KERNELS_CACHE", "~/own")
    assert autotuning.cache_folder() == tmp_path / "home/own"

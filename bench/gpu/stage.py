"""The stages, in order of worth, and how one is run: in a process of its own, killed at its limit, its output kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, TextIO

from bench.gpu.rehearsal import ENVIRONMENT
from bench.gpu.setting import read_records

ROOT = Path(__file__).parents[2]
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
KILLED, BROKEN, INTERRUPTED = "KILLED at its limit", "BROKE OFF", "INTERRUPTED"


# Set by whoever ends the run from outside: what is there by then is written, and no process is left behind.
interruption = Event()


@dataclass(frozen=True)
class Stage:
    """One stage: the module that runs it, what it tells, and its share of the minutes.

    A share is of what is left when the stage begins, among those of all stages that are left: time that a stage does
    not take goes to those after it.
    """

    name: str
    module: str
    tells: str
    share: float
    tuned: bool = False  # whether kernels may be tuned in it, or run as they do by default
    interpreted: bool = False  # whether Triton's interpreter is what it asks, on a GPU's machine too
    needs: tuple[str, ...] = ()  # operators that must have been found right, or nothing is timed

    @property
    def timed(self) -> bool:
        """Whether it times: a rehearsal does so on the CPU's own operators, which take a thousandth of the time."""
        return bool(self.needs)


ADAPTER = ("adapter_forward_", "adapter_product", "adapter_backward_", "philox_dropout")
STEP = ("stella_adamw_", "riemannian_gradient_", "project_retract_")
STAGES = (
    Stage("facts", "facts", "the machine, its software, and the ceilings: copy, matrix products, launches", 30),
    Stage("verify", "verify", "every operator against the float64 reference, default tiles, outputs full of NaN", 130),
    Stage("features", "features", "torch.compile, CUDA graph, two streams, second device, checkpointing, autocast", 60),
    Stage("adapter", "adapter", "one layer, forward and backward: ours, LoRA, as published, frozen base", 45,
          needs=ADAPTER),
    Stage("step", "step", "the optimizer step of a Llama-3-8B's factors: ours, AdamW, attach, as published", 45,
          needs=STEP),
    Stage("model", "model", "a training step of SmolLM2-135M's shape: eager, torch.compile, CUDA graph", 60,
          needs=(*ADAPTER, "stella_adamw_")),
    Stage("host", "host", "where the GPU waits for the host: gaps between kernels, time to launch", 30,
          needs=(*ADAPTER, *STEP)),
    Stage("polar", "polar", "the polar factor against torch.linalg.svd, torch.linalg.polar and compositions", 30,
          needs=("polar",)),
    Stage("tests", "tests", "pytest -m gpu: odd sizes, storages, opcheck, refusals", 40),
    Stage("sanitizer", "sanitizer", "compute-sanitizer over small odd cases", 40),
    Stage("count", "count", "the bytes of the Stiefel kernels' loads and stores, counted in Triton's interpreter", 25,
          interpreted=True),
    Stage("tuned", "adapter", "the adapter again with its tiles tuned for this GPU", 40, tuned=True, needs=ADAPTER),
    Stage("rest", "verify", "the rest of the table of cases, for as long as there is time", 30),
)  # fmt: skip


def named(name: str) -> Stage:
    """The stage of this name."""
    return next(stage for stage in STAGES if stage.name == name)


@dataclass
class Outcome:
    """How a stage ended: its status, what it wrote, how long it took, the end of what it printed."""

    stage: Stage
    status: str
    seconds: float
    limit: float
    records: list[dict[str, Any]] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Its records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def as_dict(self) -> dict[str, Any]:
        """The outcome as plain JSON types."""
        return {
            "stage": self.stage.name,
            "tells": self.stage.tells,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "limit": round(self.limit, 1),
            "records": self.records,
            "tail": self.tail if self.status in (KILLED, BROKEN, INTERRUPTED) else [],
        }


def limit_of(stage: Stage, left: float, remaining: tuple[Stage, ...]) -> float:
    """Seconds that the first of the ``remaining`` stages may take of those that are left for all of them."""
    return left * stage.share / sum(other.share for other in remaining)


def environment(stage: Stage, folder: Path, rehearse: bool) -> dict[str, str]:
    """Of a stage's process. What is tuned goes to the run's own folder: measured now, and part of what was found."""
    wanted = {"STELLA_KERNELS_AUTOTUNE": str(int(stage.tuned)), "STELLA_KERNELS_CACHE": str(folder / "tiles")}
    if rehearse and stage.timed:
        wanted["OMP_NUM_THREADS"] = "1"
    elif rehearse or stage.interpreted:
        wanted |= ENVIRONMENT
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | wanted | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def run_stage(stage: Stage, folder: Path, rehearse: bool, limit: float, log: TextIO) -> Outcome:
    """Run one stage for at most ``limit`` seconds; then it and all its children are killed."""
    command = [sys.executable, "-m", "bench.gpu", stage.name, str(folder), "--limit", f"{limit:.1f}"]
    command += ["--rehearse"] if rehearse else []
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(stage, folder, rehearse),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a process group of its own, children among it
    )
    tail: list[str] = []
    reader = Thread(target=_tee, args=(process, log, tail), daemon=True)
    reader.start()
    status = ""
    while process.poll() is None and not status:
        if interruption.wait(0.1):
            status = INTERRUPTED
        elif time.monotonic() - begin > limit:
            status = KILLED
    _kill(process)
    reader.join(10.0)
    records = read_records(folder, stage.name)
    status = status or (BROKEN if process.returncode else _status(records))
    return Outcome(stage, status, time.monotonic() - begin, limit, records, tail[-15:])


def _status(records: list[dict[str, Any]]) -> str:
    verdicts = [record["met"] for record in records if record["kind"] == "verdict"]
    if not all(verdicts):
        return FAILED
    found = verdicts or any(record["kind"] not in ("missing", "note") for record in records)
    return PASSED if found else NOT_RUN


def _kill(process: subprocess.Popen[str]) -> None:
    """The whole group, also where its first process is gone and a child of it is not."""
    with suppress(ProcessLookupError, PermissionError):  # none of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tee(process: subprocess.Popen[str], log: TextIO, tail: list[str]) -> None:
    """To the terminal and the log, without the paths of whoever ran it."""
    assert process.stdout is not None
    home = str(Path.home())
    for line in process.stdout:
        line = line.replace(str(ROOT), ".").replace(sys.prefix, "PYTHON")
        line = line.replace(home, "~") if len(home) > 1 else line
        print(line, end="", flush=True)
        log.write(line)
        log.flush()
        tail.append(line.rstrip())
        del tail[:-40]

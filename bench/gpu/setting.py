"""What a stage's process is told, and how it tells what it finds: a line of JSON each, written at once."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.common import device as devices

RECORDS = "records"  # folder of the stages' lines


@dataclass
class Setting:
    """One stage's process: where it runs, how long it may, where it writes.

    ``left`` is what a stage asks before it begins something more, so that it ends by itself; a stage that does not is
    killed, and what it has written counts.
    """

    stage: str
    folder: Path
    rehearse: bool
    limit: float  # seconds
    start: int = 0  # of a list of cases: where an earlier process of this stage was lost
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The GPU; of a rehearsal, the CPU."""
        return devices.CPU if self.rehearse else devices.named("cuda")

    @property
    def left(self) -> float:
        """Seconds of the stage's limit that are left, less what the next thing may take that nobody can stop.

        On a GPU its kernels may have to be compiled.
        """
        return self.limit - (time.monotonic() - self.began) - (3.0 if self.rehearse else 10.0)

    def record(self, kind: str, **values: Any) -> None:
        """Write a line: what kind it is of, and its values."""
        with _path(self.folder, self.stage).open("a") as file:
            file.write(json.dumps({"kind": kind, **_plain(values)}) + "\n")

    def verdict(self, met: bool, text: str) -> None:
        """Write and print whether something that has to hold does."""
        self.record("verdict", met=bool(met), text=text)
        print(f"{'holds ' if met else 'FAILS '}  {text}", flush=True)

    def missing(self, what: str) -> None:
        """Write and print what was not run, and why."""
        self.record("missing", text=what)
        print(f"not run: {what}", flush=True)

    def note(self, text: str) -> None:
        """Write and print something to know beside the rest."""
        self.record("note", text=text)
        print(text, flush=True)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _path(folder: Path, stage: str) -> Path:
    return folder / RECORDS / f"{stage}.jsonl"


def read_records(folder: Path, stage: str) -> list[dict[str, Any]]:
    """What a stage has written; a last line that was cut off by its end is left out."""
    try:
        lines = _path(folder, stage).read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def attempt(setting: Setting, what: str, run: Callable[[], Any]) -> Any:
    """What ``run`` returns; an error, out of memory or of any kind, is a verdict, and the stage goes on."""
    try:
        return run()
    except Exception as error:  # whatever a GPU, a driver or a library says
        setting.verdict(False, f"{what}: {first_line(error)}")
        if lost(error):
            raise
        return None


def first_line(error: BaseException) -> str:
    """An error on one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:300]


def lost(error: BaseException | str) -> bool:
    """Whether the device answers nothing more in this process, as after an access that was out of bounds."""
    return any(
        sign in str(error) for sign in ("CUDA error", "HIP error", "illegal memory access", "device-side assert")
    )


def importable(package: str) -> str:
    """Why a package cannot be used, or nothing where it can."""
    try:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        importlib.import_module(package)
    except Exception as error:  # one that is there and does not fit what else is
        return f"{package} does not import: {first_line(error)}"
    return ""


def parsed(arguments: list[str] | None = None) -> Setting:
    """The setting of this process from its command line, which ``run.py`` writes."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="One stage of python -m bench gpu.")
    parser.add_argument("stage")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    (given.folder / RECORDS).mkdir(parents=True, exist_ok=True)
    return Setting(given.stage, given.folder, given.rehearse, given.limit, given.start)

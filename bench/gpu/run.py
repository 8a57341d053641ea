"""``python -m bench gpu``: the stages one after the other, within some minutes, into one folder."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.device import DeviceUnavailableError, named, served
from bench.gpu.report.markdown import page
from bench.gpu.report.measured import table
from bench.gpu.report.picture import save_picture
from bench.gpu.setting import RECORDS
from bench.gpu.stage import NOT_RUN, PASSED, ROOT, STAGES, Outcome, Stage, interruption, limit_of, run_stage

MINUTES, REHEARSAL_MINUTES = 8.0, 30.0  # a rehearsal takes some, of a machine that does other things too
MEASURED = ROOT / "bench" / "measured"
FORMAT = 1  # of report.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench gpu``."""
    parser.add_argument("--minutes", type=float, help=f"in all (default: {MINUTES:g})")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, interpreted, at toy sizes: no measurement")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="these stages alone")
    parser.add_argument("--output", type=Path, help="folder (default: bench/results/gpu/CHIP)")
    parser.add_argument("--table", action="store_true", help="print the documentation's table of bench/measured")


def main(arguments: Sequence[str]) -> int:
    """Run the stages; 0 where nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.table:
        print(table(MEASURED), end="")
        return 0
    chip = "rehearsal"
    if not given.rehearse:
        try:
            device = named("cuda")
            served(device)
        except DeviceUnavailableError as error:
            parser.error(f"{error} Without a GPU there is --rehearse.")
        chip = slug(torch.cuda.get_device_name(device))
    folder: Path = given.output or ROOT / "bench" / "results" / "gpu" / chip
    minutes = given.minutes or (REHEARSAL_MINUTES if given.rehearse else MINUTES)
    stages = tuple(stage for stage in STAGES if not given.only or stage.name in given.only)
    outcomes = run_all(stages, folder.resolve(), chip, given.rehearse, 60.0 * minutes)
    print(f"\nwritten: {folder}/report.md, report.json, report.png, log.txt")
    return int(any(outcome.status not in (PASSED, NOT_RUN) for outcome in outcomes))


def slug(name: str) -> str:
    """A chip's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_all(stages: tuple[Stage, ...], folder: Path, chip: str, rehearse: bool, seconds: float) -> list[Outcome]:
    """Each stage within its part of the time; the report is written anew after each, so that any end leaves one."""
    _empty(folder)
    for number in (signal.SIGTERM, signal.SIGINT):  # an exception could come while a process is being made
        signal.signal(number, lambda *_: interruption.set())
    outcomes: list[Outcome] = []
    begin = time.monotonic()
    head: dict[str, Any] = {
        "format": FORMAT,
        "chip": chip,
        "rehearsed": rehearse,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "minutes": seconds / 60.0,
        "complete": False,
    }
    with (folder / "log.txt").open("w") as log:
        for index, stage in enumerate(stages):
            remaining = stages[index:]
            left = seconds - (time.monotonic() - begin)
            limit = limit_of(stage, left, remaining)
            title = f"\n== {stage.name}: {stage.tells} (at most {limit:.0f} s{', rehearsed' if rehearse else ''})"
            print(title, flush=True)
            log.write(title + "\n")
            outcome = _run(stage, folder, rehearse, limit, log, outcomes)
            outcomes.append(outcome)
            print(f"-- {stage.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            head["complete"] = len(outcomes) == len(stages)
            write(folder, head | {"seconds": round(time.monotonic() - begin, 1)}, outcomes, remaining[1:])
            if interruption.is_set():
                break
    return outcomes


def _run(stage: Stage, folder: Path, rehearse: bool, limit: float, log: Any, before: list[Outcome]) -> Outcome:
    if limit < 5.0:
        return Outcome(stage, NOT_RUN, 0.0, limit, [{"kind": "missing", "text": "no time left"}])
    if stage.needs and (why_not := unfit(stage, before)):
        return Outcome(stage, NOT_RUN, 0.0, limit, [{"kind": "missing", "text": f"not timed: {why_not}"}])
    return run_stage(stage, folder, rehearse, limit, log)


def unfit(stage: Stage, before: Sequence[Outcome]) -> str:
    """Why a stage must not time its operators: one of them gave a wrong result, or none of its was looked at."""
    verified = [outcome for outcome in before if outcome.stage.name == "verify"]
    if not verified:
        return ""  # left out by --only
    cases = [record for outcome in verified for record in outcome.of("case")]
    wrong = sorted({case["operator"] for case in cases if case["operator"] in stage.needs and not case["passed"]})
    if wrong:
        return f"results wrong ({', '.join(wrong)})"
    unseen = sorted(set(stage.needs) - {case["operator"] for case in cases})
    return f"results not verified ({', '.join(unseen)})" if unseen else ""


def write(folder: Path, head: dict[str, Any], outcomes: Sequence[Outcome], left: Sequence[Stage]) -> None:
    """The report: for programs, for people, and as a picture where matplotlib is there."""
    report = head | {
        "stages": [outcome.as_dict() for outcome in outcomes],
        "not_reached": [stage.name for stage in left],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    pictured = save_picture(report, folder / "report.png")
    (folder / "report.md").write_text(page(report, pictured))


def _empty(folder: Path) -> None:
    """Of an earlier run's files; nothing else is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.md", "report.png", "log.txt"):
        (folder / name).unlink(missing_ok=True)
    for name in (RECORDS, "tiles"):
        shutil.rmtree(folder / name, ignore_errors=True)

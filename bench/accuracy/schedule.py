"""Which runs there are, which are done, and the others: resumable, each run a JSON file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.accuracy.run import RATES, STEPS, Case, run
from bench.accuracy.tasks import Task

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100


def done(case: Case, results: Path) -> dict[str, Any] | None:
    """The record of a run, where it was made."""
    file = results / case.file
    return json.loads(file.read_text()) if file.exists() else None


def rate_cases(task: str, method: str, rank: int) -> list[Case]:
    return [Case(task, "rate", method, rank, rate, TUNING_SEED) for rate in RATES]


def best_rate(task: str, method: str, rank: int, results: Path) -> float | None:
    """The rate with the best validation score, the smaller of equals; None before all were tried."""
    tried = [done(case, results) for case in rate_cases(task, method, rank)]
    found = [record for record in tried if record is not None]
    if len(found) < len(RATES):
        return None
    return float(max(found, key=lambda record: (record["score"], -record["rate"]))["rate"])


def groups(tasks: Iterable[str], methods: Iterable[str], ranks: Iterable[int]) -> list[tuple[str, str, int]]:
    """Task, method and rank; the floor and the ceiling have no rank, written 0."""
    plain = ("probe", "full")
    methods = tuple(methods)
    found = [(task, method, rank) for task in tasks for rank in ranks for method in methods if method not in plain]
    return found + [(task, method, 0) for task in tasks for method in methods if method in plain]


def cases(group: tuple[str, str, int], results: Path) -> Iterator[Case]:
    """The runs of a group: the rates, then the seeds at the best of them."""
    yield from rate_cases(*group)
    rate = best_rate(*group, results)
    if rate is not None:
        task, method, rank = group
        yield from (Case(task, "test", method, rank, rate, seed) for seed in SEEDS)


def work(
    chosen: list[tuple[str, str, int]],
    results: Path,
    load: Callable[[str], Task],
    minutes: float | None = None,
    steps: int = STEPS,
) -> int:
    """Make the runs that are missing until the time is up; how many were left out."""
    from tqdm import tqdm

    each = len(RATES) + len(SEEDS)
    began, tasks, left = time.perf_counter(), {}, 0
    with tqdm(total=each * len(chosen), unit="run") as progress:
        for group in chosen:
            for case in cases(group, results):
                progress.set_description(f"{case.task} {case.method} r={case.rank} {case.rate:g}")
                if done(case, results) is None:
                    if minutes is not None and time.perf_counter() - began > 60 * minutes:
                        left += 1
                        continue
                    if case.task not in tasks:
                        tasks[case.task] = load(case.task)
                    record = run(case, tasks[case.task], steps)
                    file = results / case.file
                    file.parent.mkdir(parents=True, exist_ok=True)
                    partial = file.with_suffix(".partial")
                    partial.write_text(json.dumps(record) + "\n")
                    partial.rename(file)
                progress.update()
    return left

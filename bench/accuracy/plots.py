"""The study's picture, made from the runs' JSON files alone: scores against rank, loss against steps and seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

from bench.accuracy.tables import Record, mean_and_error, read, scores

COMPARED = ("lora", "stella")  # of the losses
CURVE_EVERY = 5  # steps that one value of a run's curve is the mean of


def mean_curve(records: Sequence[Record], task: str, method: str, rank: int) -> tuple[list[float], float]:
    """Training loss, mean over seeds of those that ran to the end, and seconds a step, their median; the test runs'."""
    key = (task, "test", method, rank)
    runs = [r for r in records if (r["task"], r["stage"], r["method"], r["rank"]) == key and not r["failed"]]
    curves = [r["curve"] for r in runs]
    if not curves:
        return [], 0.0
    return [statistics.fmean(values) for values in zip(*curves, strict=True)], statistics.median(
        r["seconds_a_step"] for r in runs
    )


def _scores_by_rank(axes: Any, records: list[Record], task: str) -> None:
    methods = sorted({r["method"] for r in records if r["task"] == task and r["rank"]})
    for method in methods:
        ranks = sorted({r["rank"] for r in records if (r["task"], r["method"]) == (task, method)})
        found = [(rank, scores(records, task, method, rank)) for rank in ranks]
        points = [(rank, *mean_and_error([*by.values()])) for rank, by in found if by]
        if not points:
            continue
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, [100 * v for v in y], [100 * e for e in error], marker="o", capsize=2, label=method)
    axes.set_xscale("log", base=2)
    axes.set_title(task)
    axes.set_xlabel("rank")
    axes.set_ylabel("test score, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")


def _losses(axes: Any, records: list[Record], task: str, rank: int, seconds: bool) -> None:
    for method in COMPARED:
        curve, step = mean_curve(records, task, method, rank)
        unit = step if seconds else 1.0
        axes.plot([unit * CURVE_EVERY * (i + 1) for i in range(len(curve))], curve, label=method)
    axes.set_title(f"{task}, r = {rank}")
    axes.set_xlabel("seconds" if seconds else "steps")
    axes.set_ylabel("training loss")
    axes.legend(fontsize="x-small")


def save(results: Path, file: Path, rank: int = 8) -> None:
    """A row for each task that has runs at this rank."""
    records = read(results)
    tasks = sorted({r["task"] for r in records if r["rank"] == rank})
    figure, grid = plt.subplots(len(tasks), 3, figsize=(11, 3 * len(tasks)), squeeze=False)
    for (by_rank, by_step, by_second), task in zip(grid, tasks, strict=True):
        _scores_by_rank(by_rank, records, task)
        _losses(by_step, records, task, rank, seconds=False)
        _losses(by_second, records, task, rank, seconds=True)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)

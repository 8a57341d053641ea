"""Tables of the study, made from the runs' JSON files alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.run import METHODS, RATES
from bench.accuracy.schedule import SEEDS

Record = dict[str, Any]
FIRST_RANK = 8


def read(results: Path) -> list[Record]:
    """Every run there is."""
    return [json.loads(file.read_text()) for file in sorted(results.glob("*/*.json"))]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, from the sample's own deviation; of one value the error is unknown (NaN)."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def paired(first: dict[int, float], second: dict[int, float]) -> tuple[float, float]:
    """Mean and standard error of ``first - second`` over the seeds that both have."""
    return mean_and_error([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def scores(records: list[Record], task: str, method: str, rank: int) -> dict[int, float]:
    """Test scores by seed."""
    key = (task, "test", method, rank)
    return {r["seed"]: r["score"] for r in records if (r["task"], r["stage"], r["method"], r["rank"]) == key}


def _rows(records: list[Record], task: str, rank: int, floor_and_ceiling: bool) -> list[str]:
    lora = scores(records, task, "lora", rank)
    rows = []
    for method in METHODS:
        own = 0 if method in ("probe", "full") else rank
        if not own and not floor_and_ceiling:
            continue
        found = scores(records, task, method, own)
        if not found:
            continue
        of = [r for r in records if (r["task"], r["method"], r["rank"]) == (task, method, own)]
        tests = [r for r in of if r["stage"] == "test"]
        mean, error = mean_and_error([*found.values()])
        difference = "-"
        if method != "lora" and lora:
            by, uncertainty = paired(found, lora)
            difference = f"{100 * by:+.1f} ± {100 * uncertainty:.1f}"
        rate = tests[0]["rate"]
        edge = " *" if rate in (RATES[0], RATES[-1]) else ""
        step = statistics.median(r["seconds_a_step"] for r in tests if r["seconds_a_step"])
        short = "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"
        rows.append(
            f"| {task} | {method} | {own or '-'} | {rate:g}{edge} | {100 * mean:.1f} ± {100 * error:.1f}{short} "
            f"| {difference} | {tests[0]['trained']:,} | {1e3 * step:.0f} |"
        )
    return rows


def tables(results: Path) -> str:
    """The table of all tasks as Markdown, and the validation scores by rate."""
    records = read(results)
    lines = [
        "| task | method | r | rate | test score, % | less LoRA, paired | trained | ms a step |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    found = {r["task"] for r in records}
    for task in sorted(found):
        ranks = sorted({r["rank"] for r in records if r["task"] == task} - {0})
        for rank in ranks:  # what has no rank is compared with LoRA at that of the protocol's first part
            lines += _rows(records, task, rank, rank == (FIRST_RANK if FIRST_RANK in ranks else ranks[0]))
    lines += ["", f"| task | method | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---|---|" + "--:|" * len(RATES)]
    for task in sorted(found):
        for method in METHODS:
            tried = [r for r in records if (r["task"], r["stage"], r["method"]) == (task, "rate", method)]
            for rank in sorted({r["rank"] for r in tried}):
                by = {
                    r["rate"]: "diverged" if r["failed"] else f"{100 * r['score']:.1f}"
                    for r in tried
                    if r["rank"] == rank
                }
                name = f"{method}, r = {rank}" if rank else method
                lines.append(f"| {task} | {name} | " + " | ".join(by.get(rate, "-") for rate in RATES) + " |")
    return "\n".join([*lines, "", *_adapters(records)])


def _adapters(records: list[Record]) -> list[str]:
    """What training did to the adapters at the chosen rates, mean over the seeds; of the runs that recorded it."""
    columns = ("change", "change_rank", "adapter_rank", "turn_in", "turn_out")
    lines = [
        "| task | method | r | rate | ‖ΔW‖ / ‖W‖ | rank of ΔW | rank of the adapter | inputs turned | outputs turned |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    told = [r for r in records if r["stage"] == "test" and r.get("adapters")]
    for task, rank in sorted({(r["task"], r["rank"]) for r in told}):
        for method in METHODS:
            runs = [r for r in told if (r["task"], r["rank"], r["method"]) == (task, rank, method)]
            if not runs:
                continue
            means = []
            for column in columns:
                values = [r["adapters"][column] for r in runs if column in r["adapters"]]
                means.append(f"{statistics.fmean(values):.3g}" if values else "-")
            lines.append(f"| {task} | {method} | {rank} | {runs[0]['rate']:g} | {' | '.join(means)} |")
    return lines

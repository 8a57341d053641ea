"""The documentation's table of GPUs: what the folders of ``bench/measured`` hold, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NONE = "No report has been sent in yet: nothing of this package has been timed on a GPU.\n"
HEADER = (
    "| GPU | when, software | operators right | copy GB/s | step, r = 16: × AdamW | layer 4096², r = 16: LoRA / ours "
    "| training step: ours / LoRA |\n|---|---|---|--:|--:|--:|--:|\n"
)


def records(report: dict[str, Any], kind: str, stage: str = "") -> list[dict[str, Any]]:
    """Of a report, every record of a kind, of one stage or of all."""
    stages = [s for s in report["stages"] if not stage or s["stage"] == stage]
    return [record for s in stages for record in s["records"] if record["kind"] == kind]


def facts(report: dict[str, Any], title: str) -> dict[str, Any]:
    """One group of facts."""
    return next((record["values"] for record in records(report, "facts") if record["title"] == title), {})


def table(folder: Path) -> str:
    """Markdown: a line for each report that is a measurement."""
    rows = []
    for path in sorted(folder.glob("*/report.json")):
        report = json.loads(path.read_text())
        if not report["rehearsed"]:
            rows.append(_row(path.parent.name, report))
    return HEADER + "".join(rows) if rows else NONE


def _row(name: str, report: dict[str, Any]) -> str:
    software, gpu, cases = facts(report, "software"), facts(report, "GPU"), records(report, "case")
    right = sum(case["passed"] for case in cases)
    copies = [record["rate"] / 1e9 for record in records(report, "ceiling") if record["name"] == "copy"]
    steps = [row["ratio_to_adamw"]["stella_adamw"] for row in records(report, "step") if row["r"] == 16]
    layers = [
        row["lora_over_ours"]
        for row in records(report, "layer", "adapter")
        if (row["m"], row["n"], row["r"], row["dtype"]) == (4096, 4096, 16, "bfloat16")
    ]
    models = [row["ours_over_lora"] for row in records(report, "model") if row["mode"] == "eager"]
    chip = gpu.get("name", name)
    when = f"{report['date']}, torch {software.get('torch')}, Triton {software.get('triton')}"
    columns = [_some(values) for values in (copies, steps, layers, models)]
    return f"| {chip} (`bench/measured/{name}`) | {when} | {right} of {len(cases)} cases | {' | '.join(columns)} |\n"


def _some(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" if value >= 100 else f"{value:.2f}" for value in values) or "not run"

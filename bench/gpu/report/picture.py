"""The report's picture, where matplotlib is there."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.gpu.report.measured import facts, records
from bench.gpu.setting import importable

COLORS = {"base": "0.6", "adamw": "0.6", "lora": "C1", "published": "C3", "attach": "C2"}


def save_picture(report: dict[str, Any], path: Path) -> bool:
    """Write a PNG of the timed tables; returns whether there was anything to draw, and something to draw it with."""
    panels = [panel for panel in (_layers(report), _steps(report), _models(report)) if panel[1]]
    if not panels or importable("matplotlib"):
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), constrained_layout=True, squeeze=False)
    for axis, (title, groups) in zip(axes[0], panels, strict=True):
        names = list(dict.fromkeys(name for values in groups.values() for name in values))
        for index, name in enumerate(names):
            height = 0.8 / len(names)
            at = [place + index * height for place, values in enumerate(groups.values()) if name in values]
            width = [1e3 * values[name] for values in groups.values() if name in values]
            axis.barh(at, width, height, label=name, color=COLORS.get(name, "C0"))
        axis.set_yticks([place + 0.4 for place in range(len(groups))], list(groups), fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds, median")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    gpu = facts(report, "GPU").get("name", report["chip"])
    warning = "REHEARSED ON A CPU, NOT MEASURED: no time here means anything" if report["rehearsed"] else str(gpu)
    figure.suptitle(f"{warning}; torch {facts(report, 'software').get('torch')}, {report['date']}", fontsize=11)
    if report["rehearsed"]:
        figure.text(0.5, 0.5, "REHEARSED, NOT MEASURED", fontsize=32, color="red", alpha=0.35, ha="center", rotation=20)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


Panel = tuple[str, dict[str, dict[str, float]]]


def _layers(report: dict[str, Any]) -> Panel:
    rows = records(report, "layer", "adapter")
    return "one layer, forward and backward", {
        f"{r['m']}×{r['n']}, T {r['tokens']}\nr {r['r']}, dropout {r['dropout']:g}\n{r['dtype']}": r["seconds"]
        for r in rows
    }


def _steps(report: dict[str, Any]) -> Panel:
    return "optimizer step of a Llama-3-8B's factors", {
        f"r = {r['r']}\n{r['layers']} layers": r["seconds"] for r in records(report, "step")
    }


def _models(report: dict[str, Any]) -> Panel:
    return "training step of SmolLM2-135M's shape", {
        f"{r['mode']}\ndropout {r['dropout']:g}": {k: statistics.median(v) for k, v in r["samples"].items()}
        for r in records(report, "model")
    }

"""The bench's rows as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

from bench.polar import Row


def save_plot(rows: Sequence[Row], path: Path, subtitle: str) -> None:
    """Write a PNG: speed-up over the SVD, over the best torch composition, and the fraction of the floor, against r."""
    panels = (
        ("times faster than torch.linalg.svd", lambda row: row.over_svd),
        ("times faster than the best torch composition", lambda row: row.over_best),
        ("fraction of the machine's floor", lambda row: row.of_floor),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.5), constrained_layout=True)
    for axis, (title, value) in zip(axes, panels, strict=True):
        for n in sorted({row.case.n for row in rows}):
            chosen = [row for row in rows if row.case.n == n]
            label = f"n = {n} ({', '.join(chosen[0].case.models)})"
            axis.plot([row.case.r for row in chosen], [value(row) for row in chosen], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row.case.r for row in rows}), [str(r) for r in sorted({row.case.r for row in rows})])
        axis.set_xlabel("rank r")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Polar retraction of a batch of (n, r) float32 factors; {subtitle}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)

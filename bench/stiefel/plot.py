"""The bench's rows as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.common.roofline import FactorsRow
from bench.common.timing import Machine
from bench.stiefel import polar, retract, step


def _rank_axis(axis: Axes, ranks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(ranks)), [str(r) for r in sorted(set(ranks))])
    axis.set_xlabel("rank r")
    axis.grid(alpha=0.3)


def save_polar_plot(rows: Sequence[polar.Row], path: Path, subtitle: str) -> None:
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
        _rank_axis(axis, [row.case.r for row in rows])
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Polar retraction of a batch of (n, r) float32 factors; {subtitle}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_step_plot(
    steps: Sequence[step.Row], retractions: Sequence[retract.Row], machine: Machine, path: Path, subtitle: str
) -> None:
    """Write a PNG: the roofline with every rank on it, and the price of a step in AdamW steps against r."""
    figure, (roof, price) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    series: list[tuple[str, str, Sequence[FactorsRow]]] = [
        ("StellaAdamW", "o", steps),
        ("project_retract_", "s", retractions),
    ]
    intensities = [0.5, 200.0]
    turn = machine.flops / machine.bandwidth
    xs = sorted([*intensities, turn])
    roof.plot(xs, [min(machine.flops, machine.bandwidth * x) / 1e9 for x in xs], color="black", label="roofline")
    for label, marker, rows in series:
        intensity = [row.flops_per_element / row.bytes_per_element for row in rows]
        reached = [row.elements * row.flops_per_element / row.seconds(row.ours) / 1e9 for row in rows]
        roof.plot(intensity, reached, marker=marker, label=label)
        for row, *at in zip(rows, intensity, reached, strict=True):
            roof.annotate(f"r={row.r}", at, textcoords="offset points", xytext=(4, -11), fontsize=8)
    roof.set_xscale("log")
    roof.set_yscale("log")
    roof.set_xlabel("flops of the geometry for each byte that must move")
    roof.set_ylabel("GFLOP/s")
    roof.set_title("on the machine's roofline", fontsize=10)
    for name, label in (("stella_adamw", "StellaAdamW"), ("attach", "attach"), ("published", "published hooks")):
        price.plot([row.r for row in steps], [row.over_adamw(name) for row in steps], marker="o", label=label)
    _rank_axis(price, [row.r for row in steps])
    price.axhline(1.0, color="black", linewidth=1, label="AdamW (fused), unconstrained")
    price.set_yscale("log")
    price.set_title("time of a whole step, in AdamW (fused) steps", fontsize=10)
    for axis in (roof, price):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(f"The optimizer step for the factors of a Llama-3-8B; {subtitle}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)

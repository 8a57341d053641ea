"""``python -m bench``: the retraction at the factor shapes of Llama-3-8B, Llama-2-7B and ViT-L."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from bench.plot import save_plot
from bench.polar import HEADER, measure, table_row, verdicts
from bench.shapes import MODELS, RANKS, cases
from bench.timing import measure_machine


def main() -> int:
    """Print the table, write JSON and a plot; 1 where a promise was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of the JSON and the plot")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long each of the cases is timed")
    arguments = parser.parse_args()

    machine = measure_machine()
    description = f"{machine.threads} threads, {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s"
    todo = cases(tuple(arguments.ranks))
    print(f"Polar factor of a batch of float32 factors; torch {torch.__version__}, {description} (measured here).")
    for model in MODELS:
        print(f"  {model.name}: factor heights n = {', '.join(map(str, model.heights))}")
    print(
        f"Medians of interleaved runs; about {len(todo) * arguments.seconds * 1.5 / 60:.0f} minutes.\n{HEADER}",
        flush=True,
    )
    rows = []
    for case in todo:
        rows.append(measure(case, machine, arguments.seconds))
        print(table_row(rows[-1]), flush=True)

    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "threads": machine.threads,
        "peak_flops": machine.flops,
        "copy_bandwidth": machine.bandwidth,
        "rows": [row.as_dict() for row in rows],
    }
    json_path, plot_path = arguments.output / "polar.json", arguments.output / "polar.png"
    json_path.write_text(json.dumps(record, indent=1) + "\n")
    save_plot(rows, plot_path, description)
    print(f"\nwritten: {json_path}, {plot_path}")

    failed = False
    for met, text in verdicts(rows):
        print(f"{'met   ' if met else 'MISSED'}  {text}")
        failed = failed or not met
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

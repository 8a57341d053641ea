"""The tables of steps over several processes: ``python -m bench distributed``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from bench.common.shapes import LLAMA_3_8B
from bench.distributed import predicted
from bench.distributed.processes import measure
from bench.distributed.ways import WAYS, shapes

LAYERS = 4
WORLDS = (1, 2, 4)


def main() -> int:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench distributed")
    parser.add_argument("output", type=Path)
    parser.add_argument("ranks", type=int, nargs="+", help="of the factors")
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, gloo, {os.cpu_count()} cores, a thread a process. A step of {LAYERS} layers of a "
        f"{LLAMA_3_8B.name}, float32, medians of interleaved rounds.\n"
        f"{'r':>5}{'processes':>11}" + "".join(f"{name + ', ms':>16}{'sent, MB':>10}" for name in WAYS)
    )
    rows = []
    for r in arguments.ranks:
        for world in WORLDS:
            found = measure(world, LAYERS, r, arguments.seconds)
            words = found["sharded"]["sent_bytes"] / 4 / len(shapes(LAYERS, r))
            assert words <= 2 * 4 * r * r, "the sums of a step are at most 4 r² words a factor, and go round twice"
            rows.append({"r": r, "processes": world, **found})
            print(
                f"{r:>5}{world:>11}"
                + "".join(f"{way['seconds'] * 1e3:>16.1f}{way['sent_bytes'] / 1e6:>10.2f}" for way in found.values()),
                flush=True,
            )
    print(f"\n{predicted.table()}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"torch": str(torch.__version__), "cores": os.cpu_count(), "rows": rows}
    (arguments.output / "distributed.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

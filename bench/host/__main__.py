"""The tables of host time, in a process of its own: ``python -m bench host``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch


def main() -> int:
    """Print the tables and write JSON; 1 where a promise was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench host")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    from bench.host import stub

    stub.install()

    from bench.adapter.lora import lora_is
    from bench.host import layer, step

    print(f"torch {torch.__version__}, launches stubbed, tensors of {layer.ROWS} × {layer.SIDE} and bfloat16, r = 16.")
    print("Host time of a layer, forward + backward, microseconds, least of interleaved rounds.")
    print(f"lora is {lora_is()}\n{layer.HEADER}")
    rows = []
    for dropout in layer.DROPOUTS:
        rows.append(layer.measure(dropout, arguments.seconds))
        print(layer.table_row(rows[-1]), flush=True)
    print(f"\nHost time of a step over {step.FACTORS} factors; adamw is torch's, fused, on as many parameters.")
    steps = step.measure(arguments.seconds)
    print(f"{step.HEADER}\n{step.table(steps)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"torch": str(torch.__version__), "layer": [row.as_dict() for row in rows], "step": steps.as_dict()}
    (arguments.output / "host.json").write_text(json.dumps(record, indent=1) + "\n")
    missed = 0
    for verdict in (*layer.verdicts(rows), *step.verdicts(steps)):
        print(f"{'met   ' if verdict.met else 'MISSED'}  {verdict.text}")
        missed += not verdict.met
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

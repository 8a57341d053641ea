"""``python -m bench.traffic FOLDER RANKS`` under TRITON_INTERPRET=1; 1 where a promise was missed.

Reads what ``python -m bench.traffic.instructions`` has written to the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench.traffic import adapter, stiefel


def main() -> int:
    """Print both tables and write them."""
    torch.manual_seed(0)
    output, ranks = Path(sys.argv[1]), [int(rank) for rank in sys.argv[2:]]
    issued = json.loads((output / "instructions.json").read_text())
    layer, layer_kept = adapter.report(ranks, issued["adapter"])
    step, step_kept = stiefel.report(ranks, issued["step"])
    output.mkdir(parents=True, exist_ok=True)
    path = output / "traffic.json"
    path.write_text(json.dumps({"adapter": layer, "step": step}, indent=1) + "\n")
    print(f"written: {path}")
    return int(not (layer_kept and step_kept))


if __name__ == "__main__":
    sys.exit(main())

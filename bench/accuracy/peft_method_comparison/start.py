"""PEFT's method comparison with StelLA: its own ``run.py``, with the geometry attached to the optimizer it builds.

``python start.py -v experiments/stella/NAME``: the arguments are those of ``run.py`` in the current folder.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from typing import Any

from stella_kernels.peft import attach_adapter


def main() -> None:
    """Run ``run.py`` of the current folder."""
    sys.path.insert(0, os.getcwd())
    benchmark: Any = importlib.import_module("utils")
    build = benchmark.get_optimizer_and_scheduler

    def with_geometry(model: Any, **options: Any) -> Any:
        optimizer, scheduler = build(model, **options)
        attach_adapter(optimizer, model)
        return optimizer, scheduler

    benchmark.get_optimizer_and_scheduler = with_geometry
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()

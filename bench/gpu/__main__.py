"""``python -m bench.gpu STAGE FOLDER``: one stage, in the process that ``run.py`` has made for it."""

from __future__ import annotations

import importlib
import sys

from bench.gpu import rehearsal
from bench.gpu.setting import attempt, parsed
from bench.gpu.stage import named


def main() -> int:
    """Run the stage; 0 where it came to its end, whatever it found."""
    setting = parsed()
    stage = named(setting.stage)
    if setting.rehearse:
        rehearsal.shrink()
        if not stage.timed and not rehearsal.serve_interpreted():
            setting.note("Triton is not here: the reference stands in for its kernels")
    module = importlib.import_module(f"bench.gpu.stages.{stage.module}")
    attempt(setting, setting.stage, lambda: module.run(setting))
    return 0


if __name__ == "__main__":
    sys.exit(main())

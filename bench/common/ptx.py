"""The libraries of tests/ptx, in which the kernels of a GPU are launched without one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch


def build(which: str) -> Path:
    """``stub`` or ``emulator``, made by CMake where it is not there yet; the folder of both."""
    folder = Path(os.environ.get("STELLA_PTX_LIBRARIES", f".cache/ptx/{which}-build")).absolute()
    if not (folder / which / "libcuda.so.1").exists():
        made = Path(__file__).parents[2]
        configure = ["cmake", "-S", str(made), "-B", str(folder), "-D", "STELLA_KERNELS_PTX=ON"]
        include = f"-DSTELLA_KERNELS_TORCH={torch.__path__[0]}"
        subprocess.run([*configure, include], check=True, stdout=subprocess.DEVNULL)
        target = f"ptx_{which}"
        subprocess.run(["cmake", "--build", str(folder), "--target", target], check=True, stdout=subprocess.DEVNULL)
    return folder

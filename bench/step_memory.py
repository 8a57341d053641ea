"""Peak memory of one optimizer step beyond the tensors it must have, measured in a process of its own (Linux).

``python -m bench.step_memory OPTIMIZER LAYERS R`` prints it as a number of bytes: the kernel's high-water mark of
resident memory over the first step, less what was resident before it, less AdamW's two moments, which that step
allocates. The table subtracts the number that torch's AdamW gives: it keeps books of each tensor too. A snapshot of the
factors or scratch that the optimizer keeps for later steps is counted, as is whatever a kernel allocates behind torch's
back. A step on the factors of a small model comes first, so that code pages and pools of threads are in place.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.model import OPTIMIZERS, llama_factors
from bench.shapes import LLAMA_3_8B
from stella_kernels.nn import StiefelFactor

AVAILABLE = Path("/proc/self/clear_refs").exists()
_STATUS = Path("/proc/self/status")


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


def _warm_up(name: str, r: int) -> None:
    factors = []
    for transposed in (False, True) * 4:
        Y = torch.linalg.qr(torch.randn(2 * r, r)).Q
        parameter = torch.nn.Parameter(Y.mT.contiguous() if transposed else Y.contiguous())
        parameter.grad = torch.randn_like(parameter)
        factors.append(StiefelFactor(parameter, transposed, "warm-up"))
    OPTIMIZERS[name](factors).step()


def extra_bytes(name: str, layers: int, r: int) -> int:
    """Peak bytes of the first step of a fresh optimizer, in this process, beyond the moments it allocates."""
    factors = llama_factors(layers, r, torch.Generator().manual_seed(r))
    _warm_up(name, r)
    optimizer = OPTIMIZERS[name](factors)
    ctypes.CDLL(None).malloc_trim(0)  # else the step would live on freed memory that is still resident
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = _resident("VmRSS")
    optimizer.step()
    moments = 2 * 4 * layers * LLAMA_3_8B.rows * r
    return max(0, _resident("VmHWM") - before - moments)


def measure_extra_bytes(name: str, layers: int, r: int) -> int:
    """The same in a fresh process, whose allocator and scratch hold nothing of an earlier measurement."""
    command = [sys.executable, "-m", "bench.step_memory", name, str(layers), str(r)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout)


if __name__ == "__main__":
    print(extra_bytes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))

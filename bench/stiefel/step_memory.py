"""Peak memory of one optimizer step beyond the tensors it must have, of a CPU in a process of its own (Linux).

``python -m bench.stiefel.step_memory OPTIMIZER LAYERS R`` prints it as a number of bytes: how far memory rises over the
first step, less AdamW's two moments, which that step allocates. The table subtracts the number that torch's AdamW
gives: it keeps books of each tensor too. A snapshot of the factors or scratch that the optimizer keeps for later steps
is counted. A step on the factors of a small model comes first, so that code pages and pools of threads are in place.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from bench.common.device import CPU, peak_bytes
from bench.common.shapes import LLAMA_3_8B
from bench.stiefel.model import OPTIMIZERS, llama_factors
from stella_kernels.nn import StiefelFactor


def _warm_up(name: str, r: int, device: torch.device) -> None:
    factors = []
    for transposed in (False, True) * 4:
        Y = torch.linalg.qr(torch.randn(2 * r, r)).Q.to(device)
        parameter = torch.nn.Parameter(Y.mT.contiguous() if transposed else Y.contiguous())
        parameter.grad = torch.randn_like(parameter)
        factors.append(StiefelFactor(parameter, transposed, "warm-up"))
    OPTIMIZERS[name](factors).step()


def extra_bytes(name: str, layers: int, r: int, device: torch.device) -> int:
    """Peak bytes of the first step of a fresh optimizer, in this process, beyond the moments it allocates."""
    factors = llama_factors(layers, r, torch.Generator().manual_seed(r), device)
    _warm_up(name, r, device)
    optimizer = OPTIMIZERS[name](factors)
    moments = 2 * 4 * layers * LLAMA_3_8B.rows * r
    return max(0, peak_bytes(device, optimizer.step) - moments)


def measure_extra_bytes(name: str, layers: int, r: int, device: torch.device) -> int:
    """The same; of a CPU in a fresh process, whose allocator and scratch hold nothing of an earlier measurement."""
    if device.type == "cuda":  # of which torch counts what it hands out
        return extra_bytes(name, layers, r, device)
    command = [sys.executable, "-m", "bench.stiefel.step_memory", name, str(layers), str(r)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return int(done.stdout)


if __name__ == "__main__":
    print(extra_bytes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), CPU))

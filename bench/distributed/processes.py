"""What a step takes and sends, measured by processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.distributed.ways import WAYS


class Sent(TorchDispatchMode):
    """Collectives inside, and the bytes that a rank of a ring sends for them."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = 0
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in name:
            world = dist.get_world_size()
            largest = max((t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), default=0)
            self.collectives += 1
            # of a ring: a sum goes round twice, a part at a time; what is gathered, once
            self.bytes += largest * (2 if "allreduce" in name or "all_reduce" in name else 1) * (world - 1) / world
        return func(*args, **(kwargs or {}))


def _process(rank: int, world: int, folder: str, layers: int, r: int, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=world, rank=rank)
    steps = {name: make(layers, r) for name, make in WAYS.items()}
    found: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()
        with Sent() as sent:
            step()
        found[name] = {"collectives": sent.collectives, "sent_bytes": sent.bytes}
    times: dict[str, list[float]] = {name: [] for name in steps}
    rounds = torch.tensor([1.0])
    begin = time.monotonic()
    while rounds.item():
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
        rounds.fill_(float(time.monotonic() - begin < seconds))
        dist.broadcast(rounds, 0)  # all processes stop in the same round
    for name, taken in times.items():
        found[name]["seconds"] = statistics.median(taken)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def measure(world: int, layers: int, r: int, seconds: float) -> dict[str, dict[str, float]]:
    """Of each way: median seconds of a step, collectives, bytes sent by a rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, folder, layers, r, seconds), nprocs=world)
        found: dict[str, dict[str, float]] = json.loads(Path(folder, "found.json").read_text())
        return found

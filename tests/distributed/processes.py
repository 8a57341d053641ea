"""Tasks that several processes run together over gloo, on the CPU, and what each of them returned."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

_TIMEOUT = datetime.timedelta(seconds=120)


def _process(rank: int, world: int, folder: str, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=world, rank=rank, timeout=_TIMEOUT)
    torch.save(task(*arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    # A mesh keeps the group, and so gloo's threads, alive: one of them that lets go of a tensor while the interpreter
    # ends takes the process down.
    os._exit(0)


def start(world: int, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run ``task(rank, *arguments)`` in ``world`` processes and wait for them."""
    # Forked from a server that has imported and done nothing else: a spawned process imports for seven seconds.
    multiprocessing.set_forkserver_preload(["stella_kernels.distributed", "stella_kernels.optim", "peft"])
    torch.multiprocessing.start_processes(task, arguments, nprocs=world, start_method="forkserver")


def together(world: int, folder: Path, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``task(*arguments)`` returned in each of ``world`` processes, by rank; what one of them raised is raised."""
    folder.mkdir(parents=True, exist_ok=True)
    start(world, _process, (world, str(folder), task, arguments))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

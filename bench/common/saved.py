"""What autograd keeps between a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")


def saved_bytes(forward: Callable[[], T], known: Iterable[Tensor]) -> tuple[T, int]:
    """What ``forward`` returns, and the bytes it keeps for backward: each storage once, those of ``known`` left out."""
    alive = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        result = forward()
    return result, sum(storage.nbytes() for storage in kept.values())

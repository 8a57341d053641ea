"""Operators of another device, judged by a table of cases that is made on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on(device: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` for tensors of the CPU: run on copies of their memory on ``device``, which are then copied back.

    The same strides, gaps and aliases there as here, so that a table of cases made on the CPU judges a GPU.
    """

    def run(*arguments: Any) -> Any:
        memory: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def there(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [there(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            here = value.untyped_storage()
            if here.data_ptr() not in memory:
                copy = torch.empty(here.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
                memory[here.data_ptr()] = here, copy.copy_(here)
            copied = memory[here.data_ptr()][1]
            moved = torch.empty(0, dtype=value.dtype, device=device)
            return moved.set_(copied, value.storage_offset(), value.shape, value.stride())

        def back(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(back(item) for item in value)
            return value.cpu() if isinstance(value, Tensor) else value

        result = call(*(there(argument) for argument in arguments))
        for here, copied in memory.values():
            here.copy_(copied)
        return back(result)

    return run

"""A GPU that is not there: tensors that say they are on ``cuda:0``, computed on the CPU.

As on a GPU, an operation on tensors of both devices is an error that names it, so that what runs here leaves no tensor
behind. Unlike torch's fake tensors these have values: code that looks at one goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

# Operations that take tensors of two devices: copies, and the step's hyperparameters, which a CPU holds.
_BOTH = ("aten::copy_", "aten::_foreach_copy_", "stella_kernels::stella_adamw_")


class OnGpu(torch.Tensor):
    """A tensor that says to Python that it is on the GPU; ``here`` holds its values.

    To torch's own C++, which has no such device here, it is one of the CPU's.
    """

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype
        )
        made.here = here
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.here.untyped_storage()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.cpu:
            return args[0].here.clone()
        if function is torch.Tensor.to:  # C++ would take one that goes to the CPU for there already
            wanted, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if wanted is not None and wanted.type == "cpu":
                return args[0].here.to(dtype or args[0].dtype, copy=True)
            args, kwargs = (args[0], dtype or args[0].dtype), {}
        with torch._C.DisableTorchFunctionSubclass():  # which would make every result a tensor of this class
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes tensors that are asked for on the GPU; in a backward pass all, as C++ asks for them on the CPU."""

    backward = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name, wanted = function._schema.name, kwargs.get("device")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = {id(value.here): value for value in tensors if isinstance(value, OnGpu)}
    left = [value for value in tensors if not isinstance(value, OnGpu) and value.dim() > 0]
    if there and left and name not in _BOTH:
        raise RuntimeError(f"{name}: found tensors on {GPU} and, of shape {tuple(left[0].shape)}, on the CPU")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    if name == "aten::_linalg_svd":  # LAPACK has no drivers to choose from
        kwargs = {key: value for key, value in kwargs.items() if key != "driver"}
    args, kwargs = tree_map(lambda value: value.here if isinstance(value, OnGpu) else value, (args, kwargs))
    result = function(*args, **kwargs)
    stays = bool(there) if wanted is None else torch.device(wanted).type == "cuda" or _Factories.backward
    same = {id(here): here for here in tree_leaves((args, kwargs)) if isinstance(here, Tensor)}

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or not stays:
            return value
        if id(value) in same:  # written in place
            return there.get(id(value), value)
        return OnGpu(value)

    return tree_map(back, result)


@contextmanager
def _backward() -> Iterator[None]:
    run = torch.autograd._engine_run_backward

    def marked(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(_Factories, "backward", True):
            return run(*args, **kwargs)

    with mock.patch("torch.autograd._engine_run_backward", marked):
        yield


_AUTOCAST = torch.autocast


@contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
    """The GPU's too, which is not there to be switched: what Python asks, and the CPU's, whose tensors C++ sees."""
    if device_type != "cuda":
        with _AUTOCAST(device_type, dtype, enabled):
            yield
        return
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        with _AUTOCAST("cpu", dtype, enabled):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The GPU, inside."""
    # A module that moves gets parameters of the other class, instead of other memory for those it has.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        autocast = mock.patch("torch.autocast", _autocast)
        with mock.patch("torch.cuda._lazy_init"), autocast, _backward(), _Factories():
            yield GPU
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)

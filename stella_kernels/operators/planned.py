"""Operators of a layer that launch plans without Python: ``torch.ops.stella_kernels_planned``.

Each returns its results, or no tensors where this kind of call has no plan yet, or may not be launched so: then the
operators of ``torch.ops.stella_kernels`` serve, and the plan that they make is kept for the next call of the kind
(``triton_kernels/launch``). What was checked when a plan was made is not checked again. The native module
``_launcher`` implements them, where it is built, once Triton's kernels have been called for; only code that runs
eagerly may call them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .signatures import AdapterBackward, AdapterForward, Signature

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear(Signature):
    """``adapter_forward_`` on torch's linear: y (..., m), A (T, r), and the seed that was drawn where p is not 0."""

    name: ClassVar[str] = "linear"
    x: Tensor
    W: Tensor
    b: Tensor | None
    U: Tensor
    S: Tensor
    Vt: Tensor
    scale: float
    p: float


@dataclass(frozen=True, slots=True)
class LinearBackward(Signature):
    """``adapter_backward_`` on grad_y W: the gradient of x, left out where it needs none, and those of the factors."""

    name: ClassVar[str] = "linear_backward"
    grad_y: Tensor
    x: Tensor
    W: Tensor
    A: Tensor
    U: Tensor
    S: Tensor
    Vt: Tensor
    scale: float
    p: float
    seed: Tensor | None
    need_x: bool
    needed: list[bool]


NAMESPACE = "stella_kernels_planned"
OPERATORS: tuple[type[Signature], ...] = (AdapterForward, AdapterBackward, Linear, LinearBackward)

# Where the joined operators have the tensors of a plan of the adapter's: their own in their order, then the product of
# the base and the seed that they make.
_LINEAR = (6, 0, 3, 4, 5, 7)  # y, x, U, S, Vt, seed
_LINEAR_BACKWARD = (8, 0, 1, 3, 4, 5, 6, 7)  # grad_x, grad_y, x, A, U, S, Vt, seed

Keep = Callable[[str, Sequence[int], torch.dtype], None]

_library = torch.library.Library(NAMESPACE, "DEF")
for _signature in OPERATORS:
    _library.define(f"{_signature.schema().split(' -> ')[0]} -> Tensor[]")
_library.define("number(Tensor[] tensors) -> int")
_adapter_forward, _adapter_backward, linear, linear_backward = (
    getattr(torch.ops.stella_kernels_planned, signature.name).default for signature in OPERATORS
)

_serving: dict[str, Keep] = {}  # by type of device, what keeps plans for it


def launcher() -> ModuleType | None:
    """The native module, or None where it was not built."""
    try:
        return importlib.import_module("stella_kernels._launcher")
    except ImportError:
        return None


def serve(device_type: str, keep: Keep) -> None:
    """From now on tensors of such devices may be launched on."""
    _serving[device_type] = keep


def may_launch(t: Tensor) -> bool:
    """Whether these operators serve for ``t``: it is what it seems, and nobody looks on who is to see all operators."""
    return (
        not torch.compiler.is_compiling()
        and t.device.type in _serving
        and type(t) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    )


def number(tensors: list[Tensor]) -> int:
    """A number that only these tensors have, as they are and where they lie; 0 where nobody can tell."""
    if not tensors or not may_launch(tensors[0]):
        return 0
    try:
        return int(torch.ops.stella_kernels_planned.number.default(tensors))
    except RuntimeError:  # there is one of another device or layout
        return 0


def keep_linear(y: Tensor) -> None:
    """For the kind of call that ``linear`` has just had no plan for: the one that ``adapter_forward_`` went by."""
    if may_launch(y):
        _serving[y.device.type](Linear.name, _LINEAR, y.dtype)


def keep_linear_backward(grad_y: Tensor, W: Tensor) -> None:
    """For the kind that ``linear_backward`` has just had no plan for: the one that ``adapter_backward_`` went by."""
    if may_launch(grad_y) and W.dtype == grad_y.dtype:
        _serving[grad_y.device.type](LinearBackward.name, _LINEAR_BACKWARD, grad_y.dtype)


def adapter_forward_(y: Tensor, *rest: Any) -> Tensor:
    """``torch.ops.stella_kernels.adapter_forward_``, by a plan where there is one."""
    if may_launch(y) and (found := _adapter_forward(y, *rest)):
        return found[0]
    return torch.ops.stella_kernels.adapter_forward_(y, *rest)


def adapter_backward_(grad_x: Tensor | None, beta: float, grad_y: Tensor, *rest: Any) -> Sequence[Tensor]:
    """``torch.ops.stella_kernels.adapter_backward_``, by a plan where there is one."""
    if may_launch(grad_y) and (found := _adapter_backward(grad_x, beta, grad_y, *rest)):
        return found
    return torch.ops.stella_kernels.adapter_backward_(grad_x, beta, grad_y, *rest)

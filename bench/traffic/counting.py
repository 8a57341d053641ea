"""Bytes counted and not timed: what Triton's kernels move in its interpreter, and what torch's operations do.

Every load and store of a kernel counts the bytes of its unmasked elements, from wherever they come: what the caches
spare is not taken off. Each torch operation that computes counts its inputs and outputs. Of the SVD those are all that
is counted but for one thing that is known of its inside: on a GPU torch copies the input, column by column, since
cuSOLVER overwrites it (``svd_cusolver_gesvdaStridedBatched`` of ATen, the driver that is asked for).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Chip:
    """Published peak rates, SXM modules, dense: NVIDIA's data sheets of the H100 and of the A100 80 GB."""

    name: str
    bandwidth: float  # bytes/s
    tf32: float  # flop/s
    multiprocessors: int
    clock: float  # Hz, at which those flop/s are reached

    def issue_seconds(self, instructions: float) -> float:
        """Of instructions of warps, at IPC on every multiprocessor."""
        return instructions / (IPC * self.multiprocessors * self.clock)


IPC = 2  # instructions of warps a clock: half of what a multiprocessor can issue, what good kernels reach
A100 = Chip("A100 SXM 80 GB", 2.039e12, 156e12, 108, 1.41e9)
CHIPS = (Chip("H100 SXM", 3.35e12, 494.7e12, 132, 1.83e9), A100)
LAUNCH_SECONDS = 3e-6  # assumed: what a launch costs a stream that is kept busy


@dataclass(frozen=True)
class Moved:
    """Of one operator or step: bytes loaded and stored by each kernel, and launches."""

    loaded: Counter[str]
    stored: Counter[str]
    launches: Counter[str]

    @property
    def bytes(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())


# Told of each access: of which launch, whether it stores, addresses of its unmasked elements, bytes of an element.
Watcher = Callable[[int, bool, Any, int], None]


@contextmanager
def counting(watch: Watcher | None = None) -> Iterator[Moved]:
    """Count what Triton's interpreter loads and stores inside, by kernel."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    kept = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")}
    launch = executor.__call__
    moved = Moved(Counter(), Counter(), Counter())
    running = [""]

    def size(pointers: Any, mask: Any, stores: bool = True) -> int:
        element = pointers.get_element_ty().primitive_bitwidth // 8
        if watch is not None:
            watch(sum(moved.launches.values()), stores, pointers.data[mask.data], element)
        return int(mask.data.sum()) * element

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        moved.loaded[running[0]] += size(pointers, mask, stores=False)
        return kept["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved.stored[running[0]] += size(pointers, mask)
        return kept["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved.stored[running[0]] += size(pointers, mask)
        return kept["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def counted_launch(self: Any, *arguments: Any, **named: Any) -> Any:
        running[0] = self.fn.__name__
        moved.launches[running[0]] += 1
        return launch(self, *arguments, **named)

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
    executor.__call__ = counted_launch
    try:
        yield moved
    finally:
        executor.__call__ = launch
        for name, function in kept.items():
            setattr(builder, name, function)


# Operations that move no memory of a tensor.
_FREE = ("_unsafe_view", "detach", "empty", "_local_scalar_dense", "profiler::", "prim::")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Operations(TorchDispatchMode):
    """Bytes in and out of every torch operation that computes, and how many of them there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        schema = function._schema
        name = schema.name.removeprefix("aten::")
        if not function.is_view and not name.startswith(_FREE):
            tensors = [args, kwargs, result]
            if not schema.returns:  # what is written in place and does not come back as the result
                written = [  # gradients only where a gradient scaler has the fused AdamW unscale them
                    a.alias_info is not None and a.alias_info.is_write and a.name != "grads" for a in schema.arguments
                ]
                tensors.append([value for value, is_written in zip(args, written, strict=False) if is_written])
            self.bytes[name] += sum(_size(t) for t in tree_leaves(tensors) if isinstance(t, Tensor))
            self.count[name] += 1
            if name == "_linalg_svd":
                self.bytes["copy for cuSOLVER"] += 2 * _size(args[0])  # read and written; no operation of its own
        return result


def operations_of(call: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Bytes in and out of the torch operations that ``call`` runs, and how many of them there are."""
    with Operations() as operations:
        call()
    return operations.bytes, operations.count


def predicted_seconds(chip: Chip, kernels: Iterable[tuple[float, float]], launches: int, flops: float) -> float:
    """Of kernels one after another, each the longer of its bytes at the peak bandwidth and its instructions at IPC, or
    of all their tf32 ``flops`` where those take longer; and the launches."""
    kernel_seconds = (max(moved / chip.bandwidth, chip.issue_seconds(issued)) for moved, issued in kernels)
    return max(sum(kernel_seconds), flops / chip.tf32) + launches * LAUNCH_SECONDS

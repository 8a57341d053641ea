"""Bytes that a step moves on a GPU, counted and not timed: Triton's kernels in its interpreter, published beside them.

Every load and store of a kernel counts the bytes of its unmasked elements, from wherever they come: what the caches
spare is not taken off. A program of a grouped kernel reads and writes its own factor's memory only, so that the bytes
of a model are those of one factor of each shape, counted at full size, times how many there are. The published step
runs on fake tensors of the model's full size: each torch operation that computes counts its inputs and outputs. Of the
SVD those are all that is counted but for one thing that is known of its inside: on a GPU torch copies the input, column
by column, since cuSOLVER overwrites it (``svd_cusolver_gesvdaStridedBatched`` of ATen, the driver that is asked for).
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.model import HIDDEN_SIZE
from bench.published import PublishedGeometry
from bench.shapes import LLAMA_3_8B
from stella_kernels.nn import StiefelFactor

LAYERS = 32
WANTED_OF_FLOOR, WANTED_LAUNCHES, WANTED_PUBLISHED = 1.15, 6, 5.0
# Words an element that passes over the factors must move when none stays in cache from one to the next, each next pass
# needing a sum over all rows of the one before: ∇ᵀY (Y, ∇); the moments' step and Gram blocks (Y, ∇, m, v; m, v); the
# update (Y, m, v; Y). A coupling that is given spares Y in the first; ∇ has to be seen whole before anything is
# written, since nothing is where one of its elements is not finite.
FLOOR_WORDS = {"coupling computed": 12, "coupling given": 11}


@dataclass(frozen=True)
class Chip:
    """Published peak rates, SXM modules, dense: NVIDIA's data sheets of the H100 and of the A100 80 GB."""

    name: str
    bandwidth: float  # bytes/s
    tf32: float  # flop/s


CHIPS = (Chip("H100 SXM", 3.35e12, 494.7e12), Chip("A100 SXM 80 GB", 2.039e12, 156e12))
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


def _adamw_arguments(n: int, r: int, transposed: bool, given: bool) -> tuple[Any, ...]:
    def stored(value: Tensor) -> Tensor:
        return value.mT.contiguous().mT if transposed else value.contiguous()

    Y = stored(torch.linalg.qr(torch.randn(n, r)).Q)
    gradient, m, v = (stored(torch.randn(n, r)) for _ in range(3))
    settings = torch.tensor([[5e-4, 0.9, 0.999, 1e-8, 7.0, 1.0, 1.0]], dtype=torch.float64)
    coupling = gradient.mT @ Y if given else Y.new_empty(0)
    return [Y], [gradient], [m], [v.square_()], [coupling], settings, False


def heights() -> Counter[tuple[int, bool]]:
    """How many factors of one layer have which height and storage (transposed)."""
    found: Counter[tuple[int, bool]] = Counter()
    for m, n in LLAMA_3_8B.projections.values():
        found[m, False] += 1
        found[n, True] += 1
    return found


def stiefel_step(r: int, given: bool) -> Moved:
    """The fused AdamW step of all factors of the model, at float32."""
    from stella_kernels.triton_kernels.operators import OPERATORS

    total = Moved(Counter(), Counter(), Counter())
    for (n, transposed), count in heights().items():
        with counting() as moved:
            OPERATORS["stella_adamw_"](*_adamw_arguments(n, r, transposed, given))
        for name in moved.launches:
            total.loaded[name] += LAYERS * count * moved.loaded[name]
            total.stored[name] += LAYERS * count * moved.stored[name]
            total.launches[name] = moved.launches[name]  # one, however many factors
    return total


# Operations that move no memory of a tensor.
_FREE = ("_unsafe_view", "detach", "empty", "_local_scalar_dense", "profiler::", "prim::")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Operations(TorchDispatchMode):
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


def published_step(r: int) -> tuple[Counter[str], Counter[str]]:
    """Bytes and operations of the published geometry around torch's AdamW, for the model's factors in float32."""
    with FakeTensorMode():
        factors = []
        for layer in range(LAYERS):
            for (n, transposed), count in heights().items():
                for index in range(count):
                    shape = (r, n) if transposed else (n, r)
                    parameter = nn.Parameter(torch.empty(shape))
                    parameter.grad = torch.empty(shape)
                    factors.append(StiefelFactor(parameter, transposed, f"{layer}.{n}.{transposed}.{index}"))
        # The optimizer that its training script names, "adamw_torch", as torch runs it on a GPU.
        optimizer = torch.optim.AdamW([f.parameter for f in factors], lr=5e-4, weight_decay=0.0, foreach=True)
        PublishedGeometry(optimizer, factors, HIDDEN_SIZE)
        optimizer.step()  # makes the moments
        return operations_of(optimizer.step)


def operations_of(call: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Bytes in and out of the torch operations that ``call`` runs, and how many of them there are."""
    with _Operations() as operations:
        call()
    return operations.bytes, operations.count


def step_flops(elements: int, r: int) -> float:
    """∇ᵀY, Y K, three Gram blocks in full, the update."""
    return elements * r * (2 + 2 + 6 + 4)


def predicted_seconds(chip: Chip, moved: int, launches: int, computing: float) -> float:
    """The longer of bytes at the peak bandwidth and ``computing`` seconds, and the launches."""
    return max(moved / chip.bandwidth, computing) + launches * LAUNCH_SECONDS


def report(ranks: Sequence[int]) -> tuple[list[dict[str, Any]], bool]:
    """Count and print; rows for JSON, and whether every promise was kept."""
    show = partial(print, flush=True)
    show(
        f"\nCounted, not timed: the optimizer step of the factors of a {LLAMA_3_8B.name}, {LAYERS} layers, float32.\n"
        f"{'r':>4} {'coupling':<20}{'MB':>9}{'launches':>9}{'of floor':>9}{'published MB':>13}{'times':>6}"
        f"{'operations':>11}" + "".join(f"  predicted {chip.name}" for chip in CHIPS)
    )
    rows: list[dict[str, Any]] = []
    kept = True
    for r in ranks:
        elements = LAYERS * LLAMA_3_8B.rows * r
        published, operations = published_step(r)
        for kind, words in FLOOR_WORDS.items():
            moved = stiefel_step(r, kind == "coupling given")
            floor = 4 * words * elements
            launches = sum(moved.launches.values())
            times = sum(published.values()) / moved.bytes
            computing = [3 * step_flops(elements, r) / chip.tf32 for chip in CHIPS]  # a product is three of tf32
            seconds = [
                predicted_seconds(chip, moved.bytes, launches, c) for chip, c in zip(CHIPS, computing, strict=True)
            ]
            show(
                f"{r:4d} {kind:<20}{moved.bytes / 1e6:9.0f}{launches:9d}{moved.bytes / floor:9.2f}"
                f"{sum(published.values()) / 1e6:13.0f}{times:6.1f}{sum(operations.values()):11d}"
                + "".join(f"  {1e3 * s:>{len(chip.name) + 7}.2f} ms" for s, chip in zip(seconds, CHIPS, strict=True))
            )
            for name in moved.launches:
                show(
                    f"     {name:<20}{moved.loaded[name] / 1e6:9.1f} MB loaded {moved.stored[name] / 1e6:9.1f} MB "
                    f"stored {moved.launches[name]:2d} launches"
                )
            by_kernel = {n: [moved.loaded[n], moved.stored[n], moved.launches[n]] for n in moved.launches}
            rows.append(
                {"r": r, "coupling": kind, "bytes": moved.bytes, "floor": floor, "launches": launches,
                 "published_bytes": dict(published), "published_operations": dict(operations),
                 "loaded_stored_launches": by_kernel, "predicted_seconds": defaultdict(float, zip(
                     (chip.name for chip in CHIPS), seconds, strict=True))}
            )  # fmt: skip
            for met, text in (
                (
                    moved.bytes <= WANTED_OF_FLOOR * floor,
                    f"{moved.bytes / floor:.2f} of the floor (wanted: 1.15)",
                ),
                (launches <= WANTED_LAUNCHES, f"{launches} launches (wanted: at most 6)"),
                (times >= WANTED_PUBLISHED, f"published moves {times:.1f} times the bytes (wanted: at least 5)"),
            ):
                show(f"    {'met   ' if met else 'MISSED'} r = {r}, {kind}: {text}")
                kept &= met
    return rows, kept


def main() -> int:
    """``python -m bench.traffic FOLDER RANKS`` under TRITON_INTERPRET=1; 1 where a promise was missed."""
    from bench import adapter_traffic  # which imports this module's counters

    torch.manual_seed(0)
    output, ranks = Path(sys.argv[1]), [int(rank) for rank in sys.argv[2:]]
    adapter, adapter_kept = adapter_traffic.report(ranks)
    step, step_kept = report(ranks)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "traffic.json"
    path.write_text(json.dumps({"adapter": adapter, "step": step}, indent=1) + "\n")
    print(f"written: {path}")
    return int(not (adapter_kept and step_kept))


if __name__ == "__main__":
    sys.exit(main())

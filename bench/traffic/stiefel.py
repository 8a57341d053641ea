"""Bytes that an optimizer step moves on a GPU, ours and the published one's; ``counting.py`` says how they are counted.

A program of a grouped kernel reads and writes its own factor's memory only, so that the bytes of a model are those of
one factor of each shape, counted at full size, times how many there are. The published step runs on fake tensors of the
model's full size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.common.shapes import LLAMA_3_8B
from bench.stiefel.model import HIDDEN_SIZE
from bench.stiefel.published import PublishedGeometry
from bench.traffic.counting import CHIPS, Moved, counting, operations_of, predicted_seconds
from stella_kernels.nn import StiefelFactor

LAYERS = 32
WANTED_OF_FLOOR, WANTED_LAUNCHES, WANTED_PUBLISHED = 1.15, 6, 5.0
# Words an element that passes over the factors must move when none stays in cache from one to the next, each next pass
# needing a sum over all rows of the one before: ∇ᵀY (Y, ∇); the moments' step and Gram blocks (Y, ∇, m, v; m, v); the
# update (Y, m, v; Y). A coupling that is given spares Y in the first; ∇ has to be seen whole before anything is
# written, since nothing is where one of its elements is not finite.
FLOOR_WORDS = {"coupling computed": 12, "coupling given": 11}


def stored(value: Tensor, transposed: bool) -> Tensor:
    """With its columns, or else its rows, side by side."""
    return value.mT.contiguous().mT if transposed else value.contiguous()


def adamw_arguments(n: int, r: int, transposed: bool, given: bool) -> tuple[Any, ...]:
    Y = stored(torch.linalg.qr(torch.randn(n, r)).Q, transposed)
    gradient, m, v = (stored(torch.randn(n, r), transposed) for _ in range(3))
    settings = torch.tensor([[5e-4, 0.9, 0.999, 1e-8, 7.0, 1.0, 1.0]], dtype=torch.float64)
    coupling = gradient.mT @ Y if given else Y.new_empty(0)
    return [Y], [gradient], [m], [v.square_()], [coupling], settings


def heights() -> Counter[tuple[int, bool]]:
    """How many factors of one layer have which height and storage (transposed)."""
    found: Counter[tuple[int, bool]] = Counter()
    for m, n in LLAMA_3_8B.projections.values():
        found[m, False] += 1
        found[n, True] += 1
    return found


def stiefel_step(r: int, given: bool) -> Moved:
    """The fused AdamW step of all factors of the model, at float32."""
    from stella_kernels.triton_kernels.registration import operators

    total = Moved(Counter(), Counter(), Counter())
    for (n, transposed), count in heights().items():
        with counting() as moved:
            operators()["stella_adamw_"](*adamw_arguments(n, r, transposed, given))
        for name in moved.launches:
            total.loaded[name] += LAYERS * count * moved.loaded[name]
            total.stored[name] += LAYERS * count * moved.stored[name]
            total.launches[name] = moved.launches[name]  # one, however many factors
    return total


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


def step_flops(elements: int, r: int) -> float:
    """∇ᵀY, Y K, three Gram blocks in full, the update."""
    return elements * r * (2 + 2 + 6 + 4)


def report(ranks: Sequence[int], issued: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Count and print; rows for JSON, and whether every promise was kept. ``issued`` by rank, coupling and kernel is of
    ``instructions.py``."""
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
            flops = 3 * step_flops(elements, r)  # a product is three of tf32
            instructions = issued[str(r)][kind]
            kernels = [(moved.loaded[k] + moved.stored[k], instructions[k]) for k in moved.launches]
            seconds = [predicted_seconds(chip, kernels, launches, flops) for chip in CHIPS]
            show(
                f"{r:4d} {kind:<20}{moved.bytes / 1e6:9.0f}{launches:9d}{moved.bytes / floor:9.2f}"
                f"{sum(published.values()) / 1e6:13.0f}{times:6.1f}{sum(operations.values()):11d}"
                + "".join(f"  {1e3 * s:>{len(chip.name) + 7}.2f} ms" for s, chip in zip(seconds, CHIPS, strict=True))
            )
            for name in moved.launches:
                show(
                    f"     {name:<20}{moved.loaded[name] / 1e6:9.1f} MB loaded {moved.stored[name] / 1e6:9.1f} MB "
                    f"stored {moved.launches[name]:2d} launches {instructions[name] / 1e6:9.1f} M instructions"
                )
            by_kernel = {n: [moved.loaded[n], moved.stored[n], moved.launches[n]] for n in moved.launches}
            rows.append(
                {"r": r, "coupling": kind, "bytes": moved.bytes, "floor": floor, "launches": launches,
                 "published_bytes": dict(published), "published_operations": dict(operations),
                 "loaded_stored_launches": by_kernel, "instructions": instructions,
                 "predicted_seconds": defaultdict(float, zip(
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

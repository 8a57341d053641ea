"""Bytes that one layer's adapter moves on a GPU beyond its base product, counted as ``counting.py`` says.

A linear layer of Llama-3-8B in bfloat16 with float32 factors, forward and backward, at full size in Triton's
interpreter. Two counts of the same run: *moved*, in which a launch counts each byte that it touches once, as a torch
operation's inputs and outputs are counted, so that factors that many programs read are read once; and *every load*,
which counts them each time, whatever the caches spare. Activations are the same in both: no program reads another's.
The published layer is three linears and dropout around the same base, less the operations of the base alone. A GPU of
more multiprocessors than an H100's runs more programs, which leave more partial sums.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.adapter.layer import Published
from bench.traffic.counting import CHIPS, Moved, counting, operations_of, predicted_seconds

TOKENS = 4096
LAYERS = {"q": (4096, 4096), "gate": (14336, 4096)}  # (m, n), out and in features
WANTED_OF_FLOOR, WANTED_PUBLISHED = 1.1, 2.5
_PAGE = 20  # bits of an address


class Touched:
    """Which elements each launch has loaded and stored, each once, by pages of memory."""

    def __init__(self) -> None:
        self._pages: dict[tuple[bool, int, int], np.ndarray[Any, Any]] = {}
        self._launch = 0
        self._finished = 0

    def __call__(self, launch: int, stores: bool, addresses: np.ndarray[Any, Any], size: int) -> None:
        """Note one load or store of elements of ``size`` bytes at ``addresses``."""
        if launch != self._launch:
            self._finished, self._launch = self.bytes, launch
            self._pages.clear()
        pages = addresses >> np.uint64(_PAGE)
        inside = ((addresses & np.uint64((1 << _PAGE) - 1)) // np.uint64(size)).astype(np.int64)
        for page in np.unique(pages):
            key = stores, size, int(page)
            if key not in self._pages:
                self._pages[key] = np.zeros((1 << _PAGE) // size, dtype=bool)
            self._pages[key][inside[pages == page]] = True

    @property
    def bytes(self) -> int:
        """Of all launches up to now."""
        return self._finished + sum(size * int(np.count_nonzero(bits)) for (_, size, _), bits in self._pages.items())


def floor_bytes(tokens: int, m: int, n: int) -> int:
    """x once forward; y read and written; Y' once, x once, ∂x read and written: bfloat16."""
    return 2 * (tokens * n + 2 * tokens * m + tokens * m + tokens * n + 2 * tokens * n)


def adapter_moved(tokens: int, m: int, n: int, r: int) -> tuple[Moved, int]:
    """Forward and backward: every load and store by kernel, and what each launch touches counted once."""
    from stella_kernels.triton_kernels.registration import operators

    # float16 stands for bfloat16, which the interpreter takes minutes for: as many bytes, in the same tiles
    x, y, grad_y, grad_x = (torch.zeros(tokens, size, dtype=torch.float16) for size in (n, m, m, n))
    U, S, Vt = torch.randn(m, r), torch.randn(r, r), torch.randn(r, n)
    touched = Touched()
    with counting(touched) as moved:
        A = operators()["adapter_forward_"](y, x, U, S, Vt, 1.0, 0.0, None)
        operators()["adapter_backward_"](grad_x, 1.0, grad_y, x, A, U, S, Vt, 1.0, 0.0, None, [True] * 3)
    return moved, touched.bytes


def published_bytes(tokens: int, m: int, n: int, r: int, dropout: float = 0.0, half: bool = False) -> Counter[str]:
    """Of the operations beyond the base's: float32 factors under autocast, as PEFT keeps them, or ``half`` ones."""

    def step(layer: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            y = layer(x)
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], grad_y)

    with FakeTensorMode():
        base = nn.Linear(n, m, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layer = Published(base, r, dropout).train()
        for linear in (layer.Vt, layer.S, layer.U) if half else ():
            linear.weight = nn.Parameter(linear.weight.detach().bfloat16())
        x = torch.empty(tokens, n, dtype=torch.bfloat16, requires_grad=True)
        grad_y = torch.empty(tokens, m, dtype=torch.bfloat16)
        whole = operations_of(lambda: step(layer, x, grad_y))[0]
        alone = operations_of(lambda: step(base, x, grad_y))[0]
    whole.subtract(alone)
    return +whole


def report(ranks: Sequence[int], issued: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Count and print; rows for JSON, and whether every promise was kept. ``issued`` by layer, rank and kernel is of
    ``instructions.py``."""
    show = partial(print, flush=True)
    show(
        f"\nCounted, not timed: an adapter forward and backward beyond its base's products, T = {TOKENS}, bfloat16, "
        "factors float32.\n(m, n): out and in features. Published: three linears, float32 factors under autocast; in "
        "brackets with bfloat16 factors.\n"
        f"{'m × n':>12}{'r':>4}{'floor MB':>9}{'moved MB':>9}{'of floor':>9}{'every load':>11}{'launches':>9}"
        f"{'published MB':>13}{'of floor':>16}" + "".join(f"  predicted {chip.name}" for chip in CHIPS)
    )
    rows: list[dict[str, Any]] = []
    kept = True
    for name, (m, n) in LAYERS.items():
        floor = floor_bytes(TOKENS, m, n)
        for r in ranks:
            moved, once = adapter_moved(TOKENS, m, n, r)
            published = published_bytes(TOKENS, m, n, r)
            least = sum(published_bytes(TOKENS, m, n, r, half=True).values()) / floor
            dropped = sum(published_bytes(TOKENS, m, n, r, dropout=0.05).values()) / floor
            times = sum(published.values()) / floor
            launches = sum(moved.launches.values())
            flops = 6.0 * TOKENS * r * (m + n)
            instructions = sum(issued[name][str(r)].values())
            seconds = [predicted_seconds(c, [(once, instructions)], launches, flops / 2) for c in CHIPS]  # half types
            show(
                f"{f'{m} × {n}':>12}{r:4d}{floor / 1e6:9.0f}{once / 1e6:9.0f}{once / floor:9.3f}"
                f"{moved.bytes / floor:11.3f}{launches:9d}{sum(published.values()) / 1e6:13.0f}"
                f"{f'{times:.2f} ({least:.2f})':>16}"
                + "".join(f"  {1e3 * s:>{len(chip.name) + 7}.3f} ms" for s, chip in zip(seconds, CHIPS, strict=True))
            )
            by_kernel = {k: [moved.loaded[k], moved.stored[k], moved.launches[k]] for k in moved.launches}
            rows.append(
                {"layer": name, "m": m, "n": n, "r": r, "tokens": TOKENS, "floor": floor, "bytes": once,
                 "every_load": moved.bytes, "launches": launches, "published_bytes": dict(published),
                 "published_of_floor": times, "published_half_of_floor": least,
                 "published_dropout_of_floor": dropped, "instructions": instructions,
                 "loaded_stored_launches": by_kernel,
                 "predicted_seconds": defaultdict(float, zip((c.name for c in CHIPS), seconds, strict=True))}
            )  # fmt: skip
            for met, text in _verdicts(once / floor, times):
                show(f"    {'met   ' if met else 'MISSED'} {m} × {n}, r = {r}: {text}")
                kept &= met
    return rows, kept


def _verdicts(ours: float, published: float) -> Iterator[tuple[bool, str]]:
    yield ours <= WANTED_OF_FLOOR, f"{ours:.3f} of the floor (wanted: at most {WANTED_OF_FLOOR})"
    yield published >= WANTED_PUBLISHED, f"published {published:.2f} of the floor (wanted: at least {WANTED_PUBLISHED})"

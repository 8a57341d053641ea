"""Host side of the grouped kernels: the table of addresses, the items, and the scratch of a call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock

import torch
import triton.language as tl
from torch import Tensor

from . import configuration
from .configuration import Tiles, arithmetic, padded_rank
from .device import Shared, capturing, keep_for_graphs, sent

HEADER = 8
FIELDS = 4
TENSORS = 5
ROW = HEADER + FIELDS * TENSORS

# Storage of a tensor, as far as the width of its loads goes. Both wide ones are 16-byte aligned in every run.
GENERAL, WIDE_ROWS, WIDE_COLUMNS = 0, 1, 2

_KEPT = 16  # tables; a model has one for each operator and dtype


def storage_of(tensor: Tensor) -> int:
    """Whether a column or a row of an (n, r) view can be read 16 bytes at a time."""
    n, r = tensor.shape
    width = 16 // tensor.element_size()
    if tensor.data_ptr() % 16:
        return GENERAL
    if tensor.stride(0) == 1 and tensor.stride(1) % width == 0 and n % width == 0:
        return WIDE_COLUMNS
    if tensor.stride(1) == 1 and tensor.stride(0) % width == 0 and r % width == 0:
        return WIDE_ROWS
    return GENERAL


@dataclass
class Table:
    """What the kernels of one call over one list of factors are told."""

    rows: Tensor  # (k, ROW) int64
    items: Tensor  # (count, 2) int64
    factors: int
    count: int
    R: int
    dtype: torch.dtype
    device: torch.device
    tiles: Tiles
    INDEX: tl.dtype
    shared: Shared  # the table itself
    held: Shared  # scratch that it holds addresses of

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory, of the arithmetic's dtype unless told."""
        return torch.empty(shape, dtype=dtype or arithmetic(self.dtype), device=self.device)


_tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
_steps: OrderedDict[tuple[object, ...], Shared] = OrderedDict()
_one_at_a_time = RLock()  # of threads that look for a table


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def table_of(
    columns: Sequence[Sequence[Tensor]],
    couplings: Sequence[Tensor] | None = None,
    steps: bool = False,
    new: Callable[[], None] | None = None,
) -> Table:
    """The table of k factors, ``columns[j][i]`` the j-th tensor of factor i, each an (n, r) view of one dtype.

    Built once for the same memory: a step whose tensors stay where they are, and a captured CUDA graph, copy nothing.
    Gradients that ``zero_grad`` frees usually come back where they were; where not, the host builds another, some ms.
    ``steps`` adds float32 scratch of the factors' size as the fifth tensor. ``new`` is called, and may raise, before a
    table is made of memory that was not met before. A table that is made while a graph is captured is that graph's: it
    has no contents before the first replay.
    """
    factors = columns[0]
    first = factors[0]
    R = padded_rank(max(Y.shape[1] for Y in factors))
    tiles = configuration.tiles_for(R, first.dtype)
    key = (
        first.device,
        first.dtype,
        tiles,
        steps,
        tuple(_identity(t) for column in columns for t in column),
        tuple((*_identity(K), K.dtype) if K.numel() else None for K in couplings or ()),
    )
    with _one_at_a_time:
        known = _tables.get(key)
        if known is None:
            if new is not None:
                new()
            known = _build(columns, couplings, steps, R, tiles)
            if not capturing(first.device):
                _tables[key] = known
                if len(_tables) > _KEPT:
                    _tables.popitem(last=False)
        else:
            _tables.move_to_end(key)
        known.shared.use()
        known.held.use()
    keep_for_graphs(first.device, known)
    return known


def _steps_of(factors: Sequence[Tensor]) -> Shared:
    """Float32 scratch for the steps of these factors, the same at every call: gradients move, factors stay."""
    key = (factors[0].device, *map(_identity, factors))
    known = _steps.get(key)
    if known is None:
        sizes = [(r, (n + 3) // 4 * 4) for n, r in (Y.shape for Y in factors)]  # a column is whole vectors
        known = Shared(*(torch.empty(size, dtype=torch.float32, device=factors[0].device) for size in sizes))
        if capturing(factors[0].device):  # in the graph's own memory
            return known
        if len(_steps) >= _KEPT:
            _steps.popitem(last=False)
        _steps[key] = known
    return known


def _on(device: torch.device, values: Sequence[Sequence[int]]) -> Tensor:
    """int64 on the device, without waiting for it."""
    return sent(torch.tensor(values, dtype=torch.int64), device)


def _fields(tensor: Tensor) -> list[int]:
    return [tensor.data_ptr(), tensor.stride(0), tensor.stride(1), storage_of(tensor)]


def _coupling_fields(K: Tensor | None) -> list[int]:
    """Kind (0: to be computed, 1: float32, 2: float64), address and strides."""
    if K is None or not K.numel():
        return [0, 0, 0, 0]
    return [2 if K.dtype == torch.float64 else 1, K.data_ptr(), K.stride(0), K.stride(1)]


def _build(
    columns: Sequence[Sequence[Tensor]], couplings: Sequence[Tensor] | None, steps: bool, R: int, tiles: Tiles
) -> Table:
    device = columns[0][0].device
    rows: list[list[int]] = []
    items: list[tuple[int, int]] = []
    held = _steps_of(columns[0]) if steps else Shared()
    reach = 0
    for i, tensors in enumerate(zip(*columns, strict=True)):
        n, r = tensors[0].shape
        chunks = range(0, n, tiles.chunk)
        row = [n, r, len(items), len(chunks), *_coupling_fields(couplings[i] if couplings else None)]
        items += [(i, begin) for begin in chunks]
        every = list(tensors)
        if steps:
            every += [tensors[0]] * (TENSORS - 1 - len(every))
            every.append(held.tensors[i].mT[:n])
        for tensor in every:
            row += _fields(tensor)
            # the furthest element that is addressed from a chunk's first row, masked ones among them
            reach = max(reach, abs(tensor.stride(0)) * tiles.chunk + abs(tensor.stride(1)) * R)
        rows.append(row + [0] * (HEADER + FIELDS * TENSORS - len(row)))
    assert all(len(row) == ROW for row in rows)
    sent_rows, sent_items = _on(device, rows), _on(device, items)
    return Table(
        rows=sent_rows,
        items=sent_items,
        factors=len(rows),
        count=len(items),
        R=R,
        dtype=columns[0][0].dtype,
        device=device,
        tiles=tiles,
        INDEX=tl.int32 if reach < 2**31 else tl.int64,
        shared=Shared(sent_rows, sent_items),
        held=held,
    )

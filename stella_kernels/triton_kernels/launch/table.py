"""Host side of the grouped kernels: the table of addresses, the items, and the scratch of a call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from operator import attrgetter, is_
from threading import RLock

import torch
import triton.language as tl
from torch import Tensor

from ...operators.memory import extent
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

    host: Tensor  # (k, ROW) int64 on the CPU
    extents: Tensor  # (columns k,) bytes from the first element of each tensor to past its last
    coupled: bool  # whether a coupling was given
    rows: Tensor  # the same on the device
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


_tables: OrderedDict[tuple[int, ...], tuple[tuple[object, ...], Table]] = OrderedDict()
_numbers: OrderedDict[int, tuple[tuple[int, ...], Table]] = OrderedDict()
_steps: OrderedDict[tuple[object, ...], Shared] = OrderedDict()
_one_at_a_time = RLock()  # of threads that look for a table

_shape, _dtype = attrgetter("shape"), attrgetter("dtype")


@dataclass(frozen=True)
class Identity:
    """What a table is of: the addresses of all tensors, and all else that it depends on."""

    addresses: tuple[int, ...]  # after the numbers of columns and of couplings
    form: tuple[object, ...]


def identity_of(columns: Sequence[Sequence[Tensor]], couplings: Sequence[Tensor] = ()) -> Identity:
    """Of the tensors of a call over k factors, ``columns[j][i]`` the j-th tensor of factor i, seen as (n, r).

    Called at every step with a thousand tensors and more: nothing is looped over in Python.
    """
    every = [*chain.from_iterable(columns), *couplings]
    if couplings and all(map(is_, couplings, repeat(couplings[0]))):  # as a rule none is given, by one empty tensor
        del every[len(every) - len(couplings) + 1 :]
    addresses = (len(columns), len(couplings), *map(Tensor.data_ptr, every))
    return Identity(
        addresses,
        (*map(_shape, every), *map(Tensor.stride, every), *map(_dtype, every), *map(Tensor.get_device, every)),
    )


def met_before(identity: Identity, steps: bool = False) -> Table | None:
    """A table of tensors that were seen in the same way before: what was asked of them then, holds still.

    Of the same memory, or of another that nothing shares: gradients that ``zero_grad`` freed usually come back where
    they were, and where not, their addresses take the places of others.
    """
    with _one_at_a_time:
        found = _tables.get(identity.addresses)
        if found is None:
            made = _readdressed(identity, steps)
            return None if made is None else _in_use(made)
        if found[0] != identity.form:
            return None
        _tables.move_to_end(identity.addresses)
        return _in_use(found[1])


def numbered(number: int) -> Table | None:
    """The table of a call whose tensors have this number (``planned.number``), while it is kept."""
    with _one_at_a_time:
        addresses, found = _numbers.get(number, ((), None))
        kept = _tables.get(addresses)
        if found is None or kept is None or kept[1] is not found:
            _numbers.pop(number, None)
            return None
        _tables.move_to_end(addresses)
        return _in_use(found)


def remember(number: int, identity: Identity, table: Table) -> None:
    """That these tensors have this number, not 0."""
    with _one_at_a_time:
        _numbers[number] = identity.addresses, table
        if len(_numbers) > _KEPT:
            _numbers.popitem(last=False)


def table_of(
    identity: Identity,
    columns: Sequence[Sequence[Tensor]],
    couplings: Sequence[Tensor] | None = None,
    steps: bool = False,
) -> Table:
    """The table of k factors of one dtype, made for this memory and found again by its identity.

    A step whose tensors stay where they are, and a captured CUDA graph, then copy nothing. ``steps`` adds float32
    scratch of the factors' size as the fifth tensor. A table that is made while a graph is captured is that graph's: it
    has no contents before the first replay.
    """
    with _one_at_a_time:
        return _in_use(_kept(identity.addresses, identity.form, _build(columns, couplings, steps)))


def _kept(addresses: tuple[int, ...], form: tuple[object, ...], table: Table) -> Table:
    if not capturing(table.device):
        _tables[addresses] = form, table
        _tables.move_to_end(addresses)
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    return table


def _in_use(table: Table) -> Table:
    table.shared.use()
    table.held.use()
    keep_for_graphs(table.device, table)
    return table


def _readdressed(identity: Identity, steps: bool) -> Table | None:
    """From a table of the same form, without couplings and with the same scratch: other addresses in their places."""
    here = identity.addresses
    for there, (form, table) in reversed(_tables.items()):
        k, columns = table.factors, there[0]
        if columns != here[0] or table.coupled or steps != bool(table.held.tensors) or form != identity.form:
            continue
        if steps and here[2 : 2 + k] != there[2 : 2 + k]:
            continue  # the scratch of the steps is those factors'
        places = torch.tensor(here[2 : 2 + columns * k], dtype=torch.int64).view(columns, k)
        rows = table.host.clone()
        fields = rows[:, HEADER : HEADER + FIELDS * columns : FIELDS]  # (k, columns)
        aligned = bool(((places.mT ^ fields) & 15 == 0).all())  # else loads have another width
        placed = bool(places[:, rows[:, 0] > 0].all())  # what is empty has no address
        if not aligned or not placed or _share(places.flatten(), table.extents):
            continue
        fields.copy_(places.mT)
        table.shared.use()
        sent_rows = sent(rows, table.device)
        made = replace(table, host=rows, rows=sent_rows, shared=Shared(sent_rows, table.items))
        return _kept(here, form, made)
    return None


def _share(addresses: Tensor, extents: Tensor) -> bool:
    """Whether the spans of any two tensors meet; which of them do, and whether that matters, is asked elsewhere."""
    begin, order = addresses.sort()
    return bool((begin[:-1] + extents[order][:-1] > begin[1:]).any())


def _steps_of(factors: Sequence[Tensor]) -> Shared:
    """Float32 scratch for the steps of these factors, the same at every call: gradients move, factors stay."""
    key = (factors[0].device, *map(Tensor.data_ptr, factors), *map(_shape, factors), *map(Tensor.stride, factors))
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


def _fields(tensor: Tensor) -> list[int]:
    return [tensor.data_ptr(), tensor.stride(0), tensor.stride(1), storage_of(tensor)]


def _coupling_fields(K: Tensor | None) -> list[int]:
    """Kind (0: to be computed, 1: float32, 2: float64), address and strides."""
    if K is None or not K.numel():
        return [0, 0, 0, 0]
    return [2 if K.dtype == torch.float64 else 1, K.data_ptr(), K.stride(0), K.stride(1)]


def _build(columns: Sequence[Sequence[Tensor]], couplings: Sequence[Tensor] | None, steps: bool) -> Table:
    first = columns[0][0]
    device = first.device
    R = padded_rank(max(Y.shape[1] for Y in columns[0]))
    tiles = configuration.tiles_for(R, first.dtype)
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
    host = torch.tensor(rows, dtype=torch.int64)
    sent_rows, sent_items = sent(host, device), sent(torch.tensor(items, dtype=torch.int64), device)
    return Table(
        host=host,
        extents=torch.tensor([extent(t) * t.element_size() for t in chain.from_iterable(columns)], dtype=torch.int64),
        coupled=any(K.numel() > 0 for K in couplings or ()),
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

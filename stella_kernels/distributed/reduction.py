"""Sums over processes: one collective for all factors whose rows the same processes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .rows import Rows

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """Factors that one operator call takes: of one device and dtype, and shared by the same processes."""

    places: list[int]  # in the list that was given
    rows: list[Rows]

    def chosen(self, *lists: Sequence[T]) -> list[list[T]]:
        """Of lists over all factors the parts that are this call's."""
        return [[each[i] for i in self.places] for each in lists]


def calls_of(rows: Sequence[Rows]) -> list[Call]:
    """The fewest calls for all of them, the same on every process."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, each in enumerate(rows):
        p = each.factor.parameter
        kinds.setdefault((id(each.group), p.device, p.dtype), []).append(i)
    return [Call(places, [rows[i] for i in places]) for places in kinds.values()]


def summed(calls: Sequence[Call], flats: Sequence[Tensor], more: Sequence[Tensor] = ()) -> tuple[list[Tensor], Tensor]:
    """Each call's flat buffer, added up over its processes, and ``more`` over those of the first call.

    ``more`` are scalars of any dtype. As many collectives as there are kinds of processes, device and dtype.
    """
    import torch.distributed as dist

    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (call, flat) in enumerate(zip(calls, flats, strict=True)):
        groups.setdefault((id(call.rows[0].group), flat.device, flat.dtype), []).append(i)
    results: list[Tensor] = list(flats)
    extra = torch.zeros(0, dtype=torch.float32)
    for first, places in enumerate(groups.values()):
        parts = [flats[i] for i in places]
        sizes = [part.numel() for part in parts]
        if first == 0 and more:
            parts = [*parts, torch.stack([value.to(parts[0]) for value in more])]
            sizes.append(len(more))
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        group = calls[places[0]].rows[0].group
        if group is not None:
            dist.all_reduce(joined, group=group)
        split = joined.split(sizes)
        for i, part in zip(places, split[: len(places)], strict=True):
            results[i] = part
        if first == 0 and more:
            extra = split[-1]
    return results, extra

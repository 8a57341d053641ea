"""The rows of a factor that this process holds, and how it comes by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn import StiefelFactor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_sharded(t: object) -> bool:
    """Whether it is a ``DTensor``; asked of many tensors at each step, and nothing of torch.distributed is imported."""
    return getattr(t, "placements", None) is not None


def why_not(factor: StiefelFactor) -> str:
    """What keeps a sharded factor from being constrained, or nothing."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Replicate, Shard

    p = factor.parameter
    if not isinstance(p, DTensor):
        return f"found a {type(p).__name__}, wanted torch.distributed.tensor.DTensor, as fully_shard makes it"
    split = [place for place in p.placements if not isinstance(place, Replicate)]
    if len(split) > 1 or any(type(place) is not Shard for place in split):
        return (
            f"found placements {tuple(p.placements)} over a mesh of {tuple(p.device_mesh.shape)}, wanted one Shard and "
            "else Replicate, as fully_shard and HSDP make them: a factor that tensor parallelism splits as well cannot "
            "be constrained. Leave the adapters out of parallelize_module"
        )
    return ""


class Rows:
    """A sharded factor as this process sees it.

    Attributes:
        factor: the factor, whose parameter is a ``DTensor``.
        group: the processes that its rows are spread over; None where each has all.
        n, r: of the whole factor.
    """

    def __init__(self, factor: StiefelFactor) -> None:
        from torch.distributed.tensor.placement_types import Shard

        parameter: Any = factor.parameter
        self.factor = factor
        self.n, self.r = factor.view.shape
        self._tall = 1 if factor.transposed else 0  # the dimension of the parameter that is n
        self._mesh = parameter.device_mesh
        self._as_stored: tuple[Any, ...] = tuple(parameter.placements)
        self._by_rows = tuple(Shard(self._tall) if isinstance(p, Shard) else p for p in self._as_stored)
        split = [i for i, place in enumerate(self._as_stored) if isinstance(place, Shard)]
        self.group: ProcessGroup | None = self._mesh.get_group(split[0]) if split else None

    @property
    def name(self) -> str:
        return self.factor.name

    @property
    def are_kept(self) -> bool:
        """Whether the parameter's own memory is these rows."""
        return self._by_rows == self._as_stored

    def holds(self, t: DTensor) -> bool:
        """Whether it is split by rows, so that ``of`` is its memory."""
        return tuple(t.placements) == self._by_rows

    def of(self, t: DTensor) -> Tensor:
        """The rows (n_i, r) of the parameter, its gradient or a moment: its memory, or received from the others."""
        if not self.holds(t):
            t = t.redistribute(self._mesh, self._by_rows)
        local = t.to_local()
        return local.mT if self.factor.transposed else local

    def put(self, rows: Tensor, into: DTensor) -> None:
        """Give ``into`` the values of all processes' rows; nothing is done where they are its memory."""
        own = into.to_local()
        if self.are_kept and rows.data_ptr() == own.data_ptr():
            return
        if self.are_kept:
            own.copy_(rows.mT if self.factor.transposed else rows)
            return
        own.copy_(self.wrapped(rows, into).redistribute(self._mesh, self._as_stored).to_local())

    def wrapped(self, rows: Tensor, like: DTensor) -> DTensor:
        """Rows as a ``DTensor`` of the parameter's shape."""
        from torch.distributed.tensor import DTensor

        local = rows.mT if self.factor.transposed else rows
        return DTensor.from_local(
            local, self._mesh, self._by_rows, run_check=False, shape=like.shape, stride=_row_major(like.shape)
        )

    def zeros(self) -> DTensor:
        """A moment, split by rows whichever way the parameter is."""
        parameter: Any = self.factor.parameter
        return self.wrapped(torch.zeros_like(self.of(parameter.detach())), parameter)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[1], 1)

"""Which dimension of a parameter ``fully_shard`` is to split, so that processes hold rows of the tall factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn import stiefel_factors


def shard_placement(model: nn.Module, processes: int | None = None) -> Callable[[nn.Parameter], Any]:
    """For ``fully_shard(layer, shard_placement_fn=shard_placement(model))``: Vᵀ (r, n) by its columns, V's rows.

    U (m, r) is split by its rows by default. ``fully_shard`` splits the second dimension evenly only, and where n is
    not a multiple of the number of processes its default stays: the step then takes rows by an all-to-all, and gives
    them back.

    Args:
        model: the model with StelLA adapters, before it is sharded; its factors are looked up once, here.
        processes: how many a parameter is split over, all by default; of HSDP, the size of its second dimension.

    Returns ``Shard(1)`` for every trained or frozen Vᵀ that can be split so, None (the default) for all else.

    Raises:
        ValueError: the model has no Stiefel factors.
    """
    from torch.distributed.tensor import Shard

    factors = stiefel_factors(model, frozen=True)
    if not factors:
        raise ValueError(
            f"model: {type(model).__name__} has no Stiefel factors, wanted a model with StelLA adapters; add them "
            "(StellaLinear, get_peft_model) before it is sharded."
        )
    transposed = {id(f.parameter): f.parameter.shape[1] for f in factors if f.transposed}

    def place(parameter: nn.Parameter) -> Any:
        import torch.distributed as dist

        columns = transposed.get(id(parameter))
        return Shard(1) if columns is not None and columns % (processes or dist.get_world_size()) == 0 else None

    return place

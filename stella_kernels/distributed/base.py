"""The other recipe: the frozen base sharded, the adapters whole on every process and their gradients averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import stiefel_factors
from .rows import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_BUCKET_BYTES = 8 << 20  # of gradients that are averaged together: small beside a layer, large beside a latency


def shard_base(
    model: nn.Module,
    layers: Iterable[nn.Module] = (),
    *,
    mesh: DeviceMesh | None = None,
    bucket_bytes: int = _BUCKET_BYTES,
    **options: Any,
) -> nn.Module:
    """``fully_shard`` with every trained parameter left whole, and its gradient averaged while backward goes on.

    An adapter is small beside its base: at r = 16 a Llama-3-8B's are 42 million of 8 billion parameters. Every process
    then takes the whole step of all factors, as under DDP, and no step sums anything over processes. Parameters and
    gradients are the same on all processes, bit for bit, if they were at the start.

    Args:
        model: a model with adapters, its base frozen.
        layers: modules to be sharded one by one, a decoder's blocks for example; the model itself comes last.
        mesh: of one dimension, over which the base is split and gradients are averaged; all processes by default.
        bucket_bytes: of gradients that are averaged together.
        options: of ``fully_shard``: mp_policy, offload_policy, reshard_after_forward.

    Returns the model, sharded in place.

    Raises:
        ValueError: the model has no trained Stiefel factors, is sharded already, or mesh has more than one dimension.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not stiefel_factors(model):
        raise ValueError(f"model: {type(model).__name__} has no trained Stiefel factors, wanted a model with adapters.")
    if any(map(is_sharded, model.parameters())):
        raise ValueError("model: found parameters that are sharded already, wanted whole ones; shard it once, by this.")
    trained = [p for p in model.parameters() if p.requires_grad]
    if mesh is None:
        mesh = init_device_mesh(trained[0].device.type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(f"mesh: found {mesh.ndim} dimensions, wanted one.")
    for each in (*layers, model):
        fully_shard(each, mesh=mesh, ignored_params=set(trained), **options)
    Averaging(trained, mesh.get_group(), bucket_bytes).install()
    return model


class Averaging:
    """Gradients of parameters that all processes hold, averaged in buckets as they become ready.

    Buckets are filled in the reverse order of the parameters, which is about that of the backward pass, and are sent in
    their order: one when all its gradients are there, and at the end of the pass what is left. A gradient that only
    some processes have counts as zero on the others.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: ProcessGroup, bucket_bytes: int) -> None:
        self._group = group
        self._buckets: list[list[nn.Parameter]] = []
        size: dict[tuple[torch.dtype, torch.device], int] = {}
        unfilled: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in reversed(parameters):
            kind = p.dtype, p.device
            if kind not in unfilled or size[kind] + p.nbytes > bucket_bytes:
                unfilled[kind], size[kind] = [], 0
                self._buckets.append(unfilled[kind])
            unfilled[kind].append(p)
            size[kind] += p.nbytes
        self._place = {id(p): i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._ready: list[set[int]] = [set() for _ in self._buckets]
        self._sent: list[tuple[Tensor, Any]] = []  # of the buckets in their order
        self._ending = False

    def install(self) -> None:
        """From now on every backward pass averages."""
        for bucket in self._buckets:
            for p in bucket:
                p.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, p: Tensor) -> None:
        if not self._ending:
            self._ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._ready[self._place[id(p)]].add(id(p))
        while (place := len(self._sent)) < len(self._buckets) and self._is_full(place):
            self._send(place)

    def _is_full(self, place: int) -> bool:
        return len(self._ready[place]) == len(self._buckets[place])

    def _send(self, place: int) -> None:
        import torch.distributed as dist

        bucket = self._buckets[place]
        parts = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in bucket]
        have = torch.tensor([p.grad is not None for p in bucket], dtype=bucket[0].dtype).to(bucket[0].device)
        joined = torch.cat([*parts, have])
        self._sent.append((joined, dist.all_reduce(joined, group=self._group, async_op=True)))

    def _end(self) -> None:
        """Send what is left, wait for all, and put the averages in place."""
        while len(self._sent) < len(self._buckets):
            self._send(len(self._sent))
        sent, self._sent, self._ending = self._sent, [], False
        for ready in self._ready:
            ready.clear()
        for bucket, (joined, work) in zip(self._buckets, sent, strict=True):
            work.wait()
            *parts, have = joined.split([*(p.numel() for p in bucket), len(bucket)])
            for p, part, held in zip(bucket, parts, have.tolist(), strict=True):
                if not held:
                    continue
                average = (part / self._group.size()).view_as(p)
                if p.grad is None:
                    p.grad = average
                else:
                    p.grad.copy_(average)

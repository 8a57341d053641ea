"""How U, S and V start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice

INITS = ("rando", "svd_major", "svd_minor", "zero", "pseudo_zero", "identity")


def _random_orthonormal(like: Tensor) -> Tensor:
    """A uniformly distributed (n, r) matrix with orthonormal columns: QR of a Gaussian, R's diagonal made positive."""
    wide = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    Q, R = torch.linalg.qr(torch.randn(like.shape, dtype=wide, device=like.device))
    sign = R.diagonal().sign()
    return Q * torch.where(sign == 0, 1.0, sign)  # without the signs, Q is not uniform (Mezzadri 2007)


@torch.no_grad()
def init_factors(
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    init: str = "rando",
    base_weight: Tensor | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Fill the factors in place: U and V with orthonormal columns, S with the identity (ones where diagonal) or zero.

    Args:
        U: (m, r), any float dtype; computed in float32 at least, as all three.
        S: (r, r) or (r,), any float dtype.
        Vt: (r, n), any float dtype.
        init: "rando" (uniform on the Stiefel manifold, from torch's default generator), "svd_major" or "svd_minor" (the
            singular vectors of the base weight with the r largest, or r smallest, singular values), "zero" (U and V as
            in "rando", S zero, so that the adapter starts as nothing), "pseudo_zero" (as "rando": the layer takes away
            the adapter's start, see `StellaLinear`), or "identity" (the first r columns of the identity: no
            randomness, for factors that a checkpoint will fill). All but the last: arXiv 2510.01938, section 5.5.
        base_weight: (m, n), or (n, m) with ``fan_in_fan_out``; needed by the svd ones, left as it is.
        fan_in_fan_out: the base weight is stored (n, m).

    Raises:
        ValueError: unknown init, shapes that do not go together, r above m or n, no base_weight where needed, or one
            that is not finite.
    """
    check_choice("init", init, INITS)
    (m, r), n = U.shape, Vt.shape[1]
    if r > min(m, n) or Vt.shape[0] != r:
        raise ValueError(
            f"U, Vt: found shapes {tuple(U.shape)}, {tuple(Vt.shape)}, wanted (m, r), (r, n) with 1 <= r <= min(m, n)."
        )
    if S.shape not in ((r, r), (r,)):
        raise ValueError(f"S: found shape {tuple(S.shape)}, wanted ({r}, {r}), or ({r},) for a diagonal S.")
    if init in ("rando", "zero", "pseudo_zero"):
        new_U, new_V = _random_orthonormal(U), _random_orthonormal(Vt.mT)
    elif init == "identity":
        new_U, new_V = torch.eye(m, r, device=U.device), torch.eye(n, r, device=Vt.device)
    else:
        new_U, new_V = _singular_vectors(base_weight, m, n, r, init, fan_in_fan_out)
    U.copy_(new_U)
    Vt.copy_(new_V.mT)
    if init == "zero":
        S.zero_()
    else:
        S.copy_(torch.ones_like(S) if S.dim() == 1 else torch.eye(r, dtype=S.dtype, device=S.device))


@torch.no_grad()
def restart_factors(U: Tensor, S: Tensor, Vt: Tensor, init: str, base_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """``init_factors`` of factors that may be sharded (DTensor), as may be the base weight; returns U and Vt whole."""
    placements = getattr(U, "placements", None)
    if placements is None:
        init_factors(U, S, Vt, init, base_weight)
        return U.clone(), Vt.clone()
    from torch.distributed.tensor import distribute_tensor

    given: tuple[Any, ...] = (U, S, Vt)
    device = given[0].to_local().device
    whole = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in given]
    weight: Any = base_weight
    if weight is not None and hasattr(weight, "full_tensor"):
        weight = weight.full_tensor() if init.startswith("svd") else None
    with _random_numbers_of_the_first(given[0].device_mesh, device):
        init_factors(whole[0], whole[1], whole[2], init, weight)
    for own, value in zip(given, whole, strict=True):
        # no process sends anything: all have the same values
        own.copy_(distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None))
    return whole[0], whole[2]


@contextmanager
def _random_numbers_of_the_first(mesh: Any, device: torch.device) -> Iterator[None]:
    """Inside, every process of a mesh draws the same numbers; outside, each goes on with its own."""
    import torch.distributed as dist

    seed = torch.randint(2**62, (1,), device=device)
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(seed))
        yield


def _singular_vectors(
    base_weight: Tensor | None, m: int, n: int, r: int, init: str, fan_in_fan_out: bool
) -> tuple[Tensor, Tensor]:
    """(m, r) and (n, r): the singular vectors of the base weight that ``init`` names."""
    if base_weight is None or not base_weight.is_floating_point():
        found = "None" if base_weight is None else f"dtype {base_weight.dtype}"
        raise ValueError(
            f"base_weight: found {found}, wanted the base layer's floating-point weight, which init={init!r} "
            "decomposes; for a quantized base use init='rando'."
        )
    stored = (n, m) if fan_in_fan_out else (m, n)
    if tuple(base_weight.shape) != stored:
        raise ValueError(f"base_weight: found shape {tuple(base_weight.shape)}, wanted {stored}.")
    if not base_weight.is_meta and not bool(base_weight.isfinite().all()):
        raise ValueError(
            f"base_weight: found NaN or an infinity, wanted finite values, which init={init!r} decomposes; load a "
            "sound checkpoint into the base, or use init='rando'."
        )
    weight = base_weight.mT if fan_in_fan_out else base_weight
    left, _, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    chosen = slice(0, r) if init == "svd_major" else slice(min(m, n) - r, min(m, n))
    return left[:, chosen], right[chosen].mT

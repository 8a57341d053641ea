"""The adapter's operators on Triton: arguments checked, kernels launched, the rest passed to the reference.

A forward pass is two or three launches, a backward pass at most five, or seven past rank 64 (six past rank 32 in
float32); nothing waits for the device and nothing is summed atomically: the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ...operators import arguments, fallback, signatures
from ...reference.philox import kept_scale
from ..launch import autotuning
from ..launch.configuration import ELEMENTS, MAX_RANK, arithmetic, element
from ..launch.device import on_device_of, runs_on, target_backend
from ..launch.plan import launch
from . import configuration
from .configuration import DROPOUT_TILE, PassTiles, fuses_core, joins_contractions, launch_options
from .dropout import dropout_kernel
from .launches import (
    Layer,
    launch_accumulate,
    launch_contract,
    launch_core,
    launch_core_gradient,
    launch_products,
    launch_spread,
    launch_sums,
    strips_of,
    threshold_of,
)


def _tiles(
    kernel: str,
    layer: Layer,
    streamed: Tensor,
    variant: tuple[object, ...],
    run: Callable[[PassTiles], None],
) -> PassTiles:
    """The default, or what is fastest on this GPU for such activations; ``run`` writes to memory of its own."""
    kind = kernel, layer.R, layer.dtype, target_backend(), streamed.dtype.itemsize > layer.dtype.itemsize
    default = configuration.default_tiles(*kind)
    sizes = (triton.next_power_of_2(size) for size in streamed.shape)
    shape_class = (layer.dtype, layer.R, streamed.dtype, *sizes, *variant)
    candidates = configuration.candidate_tiles(*kind)
    return autotuning.chosen(f"adapter {kernel}", shape_class, candidates, default, run, layer.U.device)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _project(layer: Layer, x: Tensor, tiles: PassTiles) -> tuple[Tensor, Tensor]:
    """A = d(x) V and P = A Sᵀ, (T, r): one launch, or two where columns are shared by programs."""
    A, P = (layer.new(x.shape[0], layer.r, dtype=layer.dtype) for _ in range(2))
    strips, _ = strips_of(layer, x, tiles)
    if strips > 1 or not fuses_core(layer.R, layer.dtype):
        launch_core(layer, launch_products(layer, x, layer.Vt, layer.p, tiles), A, P)
    else:
        launch_products(layer, x, layer.Vt, layer.p, tiles, (A, P))
    return A, P


def _forward(layer: Layer, y: Tensor, x: Tensor, bias: Tensor | None, read: bool) -> Tensor:
    T, m = y.shape
    if T == 0:
        return layer.new(0, layer.r, dtype=layer.dtype)

    def project(tiles: PassTiles) -> None:
        _project(layer, x, tiles)

    with on_device_of(y):
        tiles = _tiles("project", layer, x, (layer.p > 0.0,), project)
        A, P = _project(layer, x, tiles)
        if m == 0:
            return A

        def accumulate(tiles: PassTiles) -> None:
            launch_accumulate(layer, torch.empty_like(y), bias, P, read, tiles)

        tiles = _tiles("accumulate", layer, y, (read,), accumulate)
        launch_accumulate(layer, y, bias, P, read, tiles)
    return A


def adapter_forward_(a: signatures.AdapterForward) -> Tensor:
    arguments.check(a)
    if not _takes(a.U, a.y, a.x, a.S, a.Vt):
        return fallback.adapter_forward_(a)
    return _forward(_layer(a, a.y.dtype), a.y, a.x, None, True)


def adapter_product(a: signatures.AdapterProduct) -> tuple[Tensor, Tensor]:
    arguments.check(a)
    if not _takes(a.U, a.x, a.S, a.Vt, *([] if a.b is None else [a.b])):
        return fallback.adapter_product(a)
    y = a.x.new_empty((a.x.shape[0], a.U.shape[0]))  # (T, m)
    return y, _forward(_layer(a, a.x.dtype), y, a.x, a.b, False)


# ---- backward --------------------------------------------------------------------------------------------------------


def adapter_backward_(a: signatures.AdapterBackward) -> tuple[Tensor, Tensor, Tensor]:
    arguments.check(a)
    if not _takes(a.U, a.grad_y, a.x, a.A, a.S, a.Vt, *([] if a.grad_x is None else [a.grad_x])):
        return fallback.adapter_backward_(a)
    layer = _layer(a, a.grad_y.dtype)
    with on_device_of(a.grad_y):
        partials = _backward(layer, a.grad_x, a.beta, a.grad_y, a.x, a.A.contiguous(), a.needed)
        grads = launch_sums(layer, list(partials), a.needed)
    return grads[0], grads[1], grads[2]


def _backward(
    layer: Layer, grad_x: Tensor | None, beta: float, grad_y: Tensor, x: Tensor, A: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums of the factors' gradients; grad_x is written."""
    (T, n), r = x.shape, layer.r
    need_U, need_S, need_V = needed
    need_K = need_V or grad_x is not None
    need_Q = need_S or need_K
    none = layer.new(0, 0, 0)
    if T == 0 or not (need_U or need_Q):
        return none, none, none
    P = layer.new(T, r, dtype=layer.dtype)
    if need_U:
        launch_core(layer, A.unsqueeze(0), None, P)

    partial_Q = partial_U = none
    joined = joins_contractions(layer.R, layer.dtype)
    if need_Q and not joined:

        def project(tiles: PassTiles) -> None:
            launch_products(layer, grad_y, layer.U.mT, 0.0, tiles)

        tiles = _tiles("project", layer, grad_y, ("gradient",), project)
        partial_Q = launch_products(layer, grad_y, layer.U.mT, 0.0, tiles)
    if need_U or joined:

        def contract(tiles: PassTiles) -> None:
            launch_contract(layer, grad_y, P, need_Q and joined, need_U, tiles)

        tiles = _tiles("contract", layer, grad_y, (need_Q, need_U), contract)
        contracted, partial_U = launch_contract(layer, grad_y, P, need_Q and joined, need_U, tiles)
        partial_Q = contracted if joined else partial_Q
    if not need_Q:
        return partial_U, none, none
    K, partial_S = launch_core_gradient(layer, partial_Q, A, need_S, need_K)
    if not need_K or n == 0:
        return partial_U, partial_S, none

    def spread(tiles: PassTiles) -> None:
        launch_spread(layer, None if grad_x is None else torch.empty_like(grad_x), beta, x, K, need_V, tiles)

    tiles = _tiles("spread", layer, x, (layer.p > 0.0, need_V, grad_x is not None, beta != 0.0), spread)
    partial_V = launch_spread(layer, grad_x, beta, x, K, need_V, tiles)
    return partial_U, partial_S, partial_V


# ---- dropout, arguments ----------------------------------------------------------------------------------------------


def philox_dropout(a: signatures.PhiloxDropout) -> Tensor:
    x, p, seed = a.x, a.p, a.seed
    arguments.check(a)
    if p == 0.0 or not x.numel() or not runs_on(x.device):
        return fallback.philox_dropout(a)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)  # (T, n)
    T, n = rows.shape
    ROWS, COLUMNS = DROPOUT_TILE
    with on_device_of(x):
        launch(
            dropout_kernel,
            (triton.cdiv(T, ROWS) * triton.cdiv(n, COLUMNS),),
            *(rows, out, seed.to(x.device), T, n, *rows.stride(), threshold_of(p), kept_scale(p)),
            TO=element(arithmetic(x.dtype)),
            DROPS_ALL=p == 1.0,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            **launch_options(target_backend()),
        )
    return out


_Adapter = signatures.AdapterForward | signatures.AdapterProduct | signatures.AdapterBackward


def _layer(a: _Adapter, dtype: torch.dtype) -> Layer:
    return Layer(a.U, a.S, a.Vt, dtype, a.scale, a.p, a.seed)


def _takes(U: Tensor, *others: Tensor) -> bool:
    """Whether the kernels have the rank and the dtypes, and run on the GPU; S of float64 past rank 64 is more than 99
    KiB."""
    dtypes = {t.dtype for t in (U, *others)}
    most = MAX_RANK // 2 if torch.float64 in dtypes else MAX_RANK
    return 0 < U.shape[1] <= most and dtypes <= ELEMENTS.keys() and runs_on(U.device)


IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "philox_dropout": philox_dropout,
    "adapter_forward_": adapter_forward_,
    "adapter_product": adapter_product,
    "adapter_backward_": adapter_backward_,
}

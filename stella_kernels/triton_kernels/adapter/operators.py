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

from ...operators import fallback, signatures
from ..launch import autotuning
from ..launch.configuration import ELEMENTS, MAX_RANK, arithmetic, element
from ..launch.device import on_device_of, target_backend
from . import configuration
from .configuration import DROPOUT_TILE, PassTiles, fuses_core, joins_contractions, launch_options
from .dropout import dropout_kernel
from .launches import (
    Layer,
    inverse_of,
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
    _check(a, a.x, y=a.y)
    if not _takes(a.U, a.y, a.x, a.S, a.Vt):
        return fallback.adapter_forward_(a)
    return _forward(_layer(a, a.y.dtype), a.y, a.x, None, True)


def adapter_product(a: signatures.AdapterProduct) -> tuple[Tensor, Tensor]:
    _check(a, a.x)
    if a.b is not None and a.b.shape != (a.U.shape[0],):
        raise RuntimeError(f"adapter_product: b: found {tuple(a.b.shape)}, wanted ({a.U.shape[0]},), U's rows.")
    if not _takes(a.U, a.x, a.S, a.Vt, *([] if a.b is None else [a.b])):
        return fallback.adapter_product(a)
    y = a.x.new_empty((a.x.shape[0], a.U.shape[0]))  # (T, m)
    return y, _forward(_layer(a, a.x.dtype), y, a.x, a.b, False)


# ---- backward --------------------------------------------------------------------------------------------------------


def adapter_backward_(a: signatures.AdapterBackward) -> tuple[Tensor, Tensor, Tensor]:
    given = {} if a.grad_x is None else {"grad_x": a.grad_x}
    _check(a, a.x, grad_y=a.grad_y, A=a.A, **given)
    if len(a.needed) != 3:
        raise RuntimeError(f"adapter_backward_: needed: found {len(a.needed)} flags, wanted three, for U, S and Vt.")
    if not _takes(a.U, a.grad_y, a.x, a.A, a.S, a.Vt, *given.values()):
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
    if p == 0.0 or not x.numel() or x.dtype not in ELEMENTS:
        return fallback.philox_dropout(a)
    _check_dropout("philox_dropout", p, seed)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)  # (T, n)
    T, n = rows.shape
    ROWS, COLUMNS = DROPOUT_TILE
    with on_device_of(x):
        dropout_kernel[(triton.cdiv(T, ROWS) * triton.cdiv(n, COLUMNS),)](
            *(rows, out, seed.to(x.device), T, n, *rows.stride(), threshold_of(p), inverse_of(p)),
            TO=element(arithmetic(x.dtype)),
            DROPS_ALL=p == 1.0,
            QUADS=n % 4 == 0,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            **launch_options(target_backend()),
        )
    return out


def _check_dropout(operator: str, p: float, seed: Tensor | None) -> None:
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"{operator}: p: found {p}, wanted a probability in [0, 1].")
    if p > 0.0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
        found = "None" if seed is None else f"{tuple(seed.shape)}, {seed.dtype}"
        raise RuntimeError(f"{operator}: seed: found {found}, wanted an int64 scalar tensor beside a dropout.")


_Adapter = signatures.AdapterForward | signatures.AdapterProduct | signatures.AdapterBackward


def _layer(a: _Adapter, dtype: torch.dtype) -> Layer:
    return Layer(a.U, a.S, a.Vt, dtype, a.scale, a.p, a.seed)


def _check(a: _Adapter, x: Tensor, **rows: Tensor) -> None:
    """Raise RuntimeError, as the CPU kernels do, where the arguments do not belong together."""
    operator, U, S, Vt = a.name, a.U, a.S, a.Vt
    if U.dim() != 2 or Vt.dim() != 2 or x.dim() != 2:
        raise RuntimeError(
            f"{operator}: found U {tuple(U.shape)}, Vt {tuple(Vt.shape)} and x {tuple(x.shape)}, wanted matrices "
            "(m, r), (r, n) and (T, n)."
        )
    (m, r), (T, n) = U.shape, x.shape
    wanted = {"Vt": (r, n), "S": (r,) if S.dim() == 1 else (r, r)}
    wanted |= {"y": (T, m), "grad_y": (T, m), "A": (T, r), "grad_x": (T, n)}
    for name, tensor in {"S": S, "Vt": Vt, **rows}.items():
        if tensor.shape != wanted[name]:
            raise RuntimeError(
                f"{operator}: {name}: found {tuple(tensor.shape)}, wanted {wanted[name]} beside U {tuple(U.shape)} "
                f"and x {tuple(x.shape)}."
            )
    for name, tensor in {"U": U, "S": S, "Vt": Vt, **rows}.items():
        if tensor.device != x.device:
            raise RuntimeError(f"{operator}: {name}: found on {tensor.device}, wanted on x's device, {x.device}.")
    _check_dropout(operator, a.p, a.seed)


def _takes(U: Tensor, *others: Tensor) -> bool:
    """Whether the kernels have the rank and the dtypes; S of float64 past rank 64 is more than 99 KiB."""
    dtypes = {t.dtype for t in (U, *others)}
    most = MAX_RANK // 2 if torch.float64 in dtypes else MAX_RANK
    return 0 < U.shape[1] <= most and dtypes <= ELEMENTS.keys()


IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "philox_dropout": philox_dropout,
    "adapter_forward_": adapter_forward_,
    "adapter_product": adapter_product,
    "adapter_backward_": adapter_backward_,
}

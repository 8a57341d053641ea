"""The adapter's operators on Triton: arguments checked, kernels launched, the rest passed to the reference.

A forward pass is two or three launches, a backward pass at most five, or seven past rank 64 (six past rank 32 in
float32); nothing waits for the device and nothing is summed atomically: the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from ..reference import philox
from . import adapter_configuration, autotuning
from .adapter import accumulate_kernel, core_kernel, project_kernel
from .adapter_configuration import (
    DROPOUT_TILE,
    MULTIPROCESSORS,
    SUM_ITEMS,
    PassTiles,
    core_precision,
    fuses_core,
    joins_contractions,
    joins_core_gradient,
    launch_options,
)
from .adapter_gradient import contract_kernel, core_gradient_kernel, spread_kernel, sum_kernel
from .configuration import ELEMENTS, MAX_RANK, arithmetic, padded_rank, precision
from .dropout import dropout_kernel
from .stiefel import on_device_of, target_backend
from .table import element

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """What the kernels of one call share."""

    U: Tensor
    S: Tensor
    Vt: Tensor
    dtype: torch.dtype  # of the layer: everything is computed in it, and summed in its arithmetic's
    scale: float
    p: float
    seed: Tensor | None

    @property
    def r(self) -> int:
        return self.U.shape[1]

    @property
    def R(self) -> int:
        return padded_rank(self.r)

    @property
    def wide(self) -> torch.dtype:
        return arithmetic(self.dtype)

    @property
    def core_strides(self) -> tuple[int, int]:
        return self.S.stride(0), self.S.stride(-1)

    def types(self) -> Arguments:
        """Compile-time dtypes. The interpreter has no products of bfloat16."""
        interpreted = target_backend() == "interpreter"
        return {
            "OPERAND": element(self.dtype),
            "DOT": element(self.wide if interpreted else self.dtype),
            "TO": element(self.wide),
            "PRECISION": precision(self.dtype, target_backend()),
            "R": self.R,
        }

    def core(self) -> Arguments:
        """The same for the products with S."""
        types = self.types()
        core = {name: types[name] for name in ("OPERAND", "TO", "R")}
        return {**core, "CORE": core_precision(self.dtype, target_backend()), "DIAGONAL": self.S.dim() == 1}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory, of the arithmetic's dtype unless told."""
        return torch.empty(shape, dtype=dtype or self.wide, device=self.U.device)


def _dropout(p: float, n: int) -> Arguments:
    """Compile-time switches of the mask of (T, n) activations."""
    return {"DROPOUT": p > 0.0, "DROPS_ALL": p == 1.0, "QUADS": n % 4 == 0}


def _threshold(p: float) -> int:
    """The smallest word that keeps its element, as the int32 of the same bits."""
    threshold = min(philox.keep_threshold(p), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def _inverse(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _index(rows: int, columns: int, *tensors: Tensor) -> tl.dtype:
    """The dtype of offsets inside a program's part: 64 bits where a stride asks for them."""
    reach = max(rows * abs(t.stride(0)) + columns * abs(t.stride(1)) for t in tensors)
    return tl.int32 if reach < 2**31 else tl.int64


def _options(tiles: PassTiles, columns: bool = True) -> Arguments:
    options = {"ROWS": tiles.rows, "num_warps": tiles.warps, "num_stages": tiles.stages}
    options |= {"COLUMNS": tiles.columns, "STAGES": tiles.stages} if columns else {}
    return options | launch_options(target_backend())


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if target_backend() == "interpreter":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _programs(tiles: PassTiles, device: torch.device) -> int:
    return max(1, tiles.programs * _multiprocessors(device) // MULTIPROCESSORS)


def _rows_of_chunk(T: int, strips: int, tiles: PassTiles, device: torch.device) -> int:
    """Rows that one program takes of its strip of columns, so that no more programs run than were asked for."""
    chunks = max(1, _programs(tiles, device) // strips)
    return triton.cdiv(triton.cdiv(T, chunks), tiles.rows) * tiles.rows


def _tiles(
    kernel: str,
    layer: Layer,
    streamed: Tensor,
    variant: tuple[object, ...],
    run: Callable[[PassTiles], None],
) -> PassTiles:
    """The default, or what is fastest on this GPU for such activations; ``run`` writes to memory of its own."""
    kind = kernel, layer.R, layer.dtype, target_backend(), streamed.dtype.itemsize > layer.dtype.itemsize
    default = adapter_configuration.default_tiles(*kind)
    sizes = (triton.next_power_of_2(size) for size in streamed.shape)
    shape_class = (layer.dtype, layer.R, streamed.dtype, *sizes, *variant)
    candidates = adapter_configuration.candidate_tiles(*kind)
    return autotuning.chosen(f"adapter {kernel}", shape_class, candidates, default, run, layer.U.device)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _strips(layer: Layer, x: Tensor, tiles: PassTiles) -> tuple[int, int]:
    """How many programs share the columns of a block of x's rows, and how many columns one takes."""
    T, n = x.shape
    most = triton.cdiv(n, 4 * tiles.columns)  # of four tiles at least
    wanted = max(1, min(most, _programs(tiles, x.device) // triton.cdiv(T, tiles.rows)))
    width = triton.cdiv(triton.cdiv(n, wanted), tiles.columns) * tiles.columns
    return max(1, triton.cdiv(n, width)) if n else 1, width


def _project(layer: Layer, x: Tensor, tiles: PassTiles) -> tuple[Tensor, Tensor]:
    """A = d(x) V and P = A Sᵀ, (T, r): one launch, or two where columns are shared by programs."""
    A, P = (layer.new(x.shape[0], layer.r, dtype=layer.dtype) for _ in range(2))
    strips, _ = _strips(layer, x, tiles)
    if strips > 1 or not fuses_core(layer.R, layer.dtype):
        _core(layer, _products(layer, x, layer.Vt, layer.p, tiles), A, P)
    else:
        _products(layer, x, layer.Vt, layer.p, tiles, (A, P))
    return A, P


def _products(
    layer: Layer, x: Tensor, factor: Tensor, p: float, tiles: PassTiles, out: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Partial sums of d(x) factorᵀ, (strips, T, r), of a factor (r, n); or A and P to ``out``: one launch."""
    (T, n), r = x.shape, layer.r
    strips, width = _strips(layer, x, tiles)
    partials = layer.new(strips, T, r) if out is None else layer.new(0)
    A, P = out or (partials, partials)
    project_kernel[(triton.cdiv(T, tiles.rows) * strips,)](
        *(x, factor, layer.S, A, P, partials, _seed(layer, x), T, n, r, width, *x.stride(), *factor.stride()),
        *(*layer.core_strides, _threshold(p), _inverse(p)),
        **(layer.types() | layer.core() | _dropout(p, n)),
        INDEX=_index(max(tiles.rows, layer.R), n, x, factor),
        SPLIT=out is None,
        **_options(tiles),
    )
    return partials


def _core(
    layer: Layer, partials: Tensor, A: Tensor | None, P: Tensor, scale: float = 1.0, transposed: bool = False
) -> None:
    """A = ``scale`` times the sum of ``partials`` (splits, T, r), where it is wanted, and P = A Sᵀ or, ``transposed``,
    A S: one launch."""
    splits, T, r = partials.shape
    tiles = adapter_configuration.default_tiles("core", layer.R, layer.dtype, target_backend())
    strides = layer.core_strides[::-1] if transposed else layer.core_strides
    core_kernel[(triton.cdiv(T, tiles.rows),)](
        *(partials, layer.S, P if A is None else A, P, T, r, splits, *strides, scale),
        **layer.core(),
        KEEP=A is not None,
        **_options(tiles, columns=False),
    )


def _accumulate(layer: Layer, y: Tensor, bias: Tensor | None, P: Tensor, read: bool, tiles: PassTiles) -> None:
    """y + s P Uᵀ, or b + s P Uᵀ, into y: one launch."""
    T, m = y.shape
    strips = triton.cdiv(m, tiles.columns)
    chunk = _rows_of_chunk(T, strips, tiles, layer.U.device)
    accumulate_kernel[(triton.cdiv(T, chunk) * strips,)](
        *(y, y if bias is None else bias, P, layer.U, T, m, layer.r, chunk, *y.stride()),
        *(0 if bias is None else bias.stride(0), *layer.U.stride(), layer.scale),
        **layer.types(),
        INDEX=_index(max(chunk, m), max(m, layer.R), y, layer.U),
        READ=read,
        BIAS=bias is not None,
        **_options(tiles),
    )


def _seed(layer: Layer, x: Tensor) -> Tensor:
    if layer.p == 0.0:
        return x  # never read
    assert layer.seed is not None
    return layer.seed.to(x.device)


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
            _accumulate(layer, torch.empty_like(y), bias, P, read, tiles)

        tiles = _tiles("accumulate", layer, y, (read,), accumulate)
        _accumulate(layer, y, bias, P, read, tiles)
    return A


def adapter_forward_(
    y: Tensor, x: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
) -> Tensor:
    """y += s d(x) V Sᵀ Uᵀ in place; returns A = d(x) V (T, r); see ``ops.py``."""
    _check("adapter_forward_", U, S, Vt, p, seed, x=x, y=y)
    if not _takes(U, y, x, S, Vt):
        return _reference("adapter_forward_", y, x, U, S, Vt, scale, p, seed)
    return _forward(Layer(U, S, Vt, y.dtype, scale, p, seed), y, x, None, True)


def adapter_product(
    x: Tensor, b: Tensor | None, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = b + s d(x) V Sᵀ Uᵀ and A; see ``ops.py``."""
    _check("adapter_product", U, S, Vt, p, seed, x=x)
    if b is not None and b.shape != (U.shape[0],):
        raise RuntimeError(f"adapter_product: b: found {tuple(b.shape)}, wanted ({U.shape[0]},), U's rows.")
    if not _takes(U, x, S, Vt, *([] if b is None else [b])):
        return _reference("adapter_product", x, b, U, S, Vt, scale, p, seed)
    y = x.new_empty((x.shape[0], U.shape[0]))  # (T, m)
    return y, _forward(Layer(U, S, Vt, x.dtype, scale, p, seed), y, x, b, False)


# ---- backward --------------------------------------------------------------------------------------------------------


def _contract(
    layer: Layer, grad_y: Tensor, P: Tensor, need_Q: bool, need_U: bool, tiles: PassTiles
) -> tuple[Tensor, Tensor]:
    """Partial sums of Y' U (strips, T, r) and of Y'ᵀ P (chunks, m, r): one launch, Y' read once."""
    (T, m), r = grad_y.shape, layer.r
    strips = max(1, triton.cdiv(m, tiles.columns))
    chunk = _rows_of_chunk(T, strips, tiles, layer.U.device)
    chunks = triton.cdiv(T, chunk)
    partial_Q = layer.new(strips if need_Q else 0, T, r)
    partial_U = layer.new(chunks if need_U else 0, m, r)
    contract_kernel[(chunks * strips,)](
        *(grad_y, P, layer.U, partial_Q, partial_U, T, m, r, chunk, *grad_y.stride(), *layer.U.stride()),
        **layer.types(),
        INDEX=_index(max(chunk, m), max(m, layer.R), grad_y, layer.U),
        NEED_Q=need_Q,
        NEED_U=need_U,
        **_options(tiles),
    )
    return partial_Q, partial_U


def _core_gradient(layer: Layer, partial_Q: Tensor, A: Tensor, need_S: bool, need_K: bool) -> tuple[Tensor, Tensor]:
    """K = Q S (T, r) and partial sums of ∂S = Qᵀ A: one launch, two where registers do not hold both."""
    splits, T, r = partial_Q.shape
    tiles = adapter_configuration.default_tiles("core", layer.R, layer.dtype, target_backend())
    chunk = _rows_of_chunk(T, 1, tiles, layer.U.device)
    chunks = triton.cdiv(T, chunk)
    K = layer.new(T if need_K else 0, r, dtype=layer.dtype)
    partial_S = layer.new(chunks if need_S else 0, *layer.S.shape)
    if need_K and not joins_core_gradient(layer.R):
        _core(layer, partial_Q, None, K, layer.scale, transposed=True)
        need_K = False
    if need_S or need_K:
        core_gradient_kernel[(chunks,)](
            *(partial_Q, A, layer.S, K, partial_S, T, r, splits, chunk, *layer.core_strides, layer.scale),
            **layer.core(),
            NEED_S=need_S,
            NEED_K=need_K,
            **_options(tiles, columns=False),
        )
    return K, partial_S


def _spread(
    layer: Layer, grad_x: Tensor | None, beta: float, x: Tensor, K: Tensor, need_V: bool, tiles: PassTiles
) -> Tensor:
    """∂x = β ∂x + dᵀ(K Vᵀ) in place; partial sums of ∂Vᵀ = Kᵀ d(x), (chunks, r, n): one launch, x read once."""
    (T, n), r = x.shape, layer.r
    strips = triton.cdiv(n, tiles.columns)
    chunk = _rows_of_chunk(T, strips, tiles, layer.U.device)
    chunks = triton.cdiv(T, chunk)
    partial_V = layer.new(chunks if need_V else 0, r, n)
    target = x if grad_x is None else grad_x
    spread_kernel[(chunks * strips,)](
        *(x, K, layer.Vt, target, partial_V, _seed(layer, x), T, n, r, chunk),
        *(*x.stride(), *layer.Vt.stride(), *target.stride(), _threshold(layer.p), _inverse(layer.p), beta),
        **layer.types(),
        **_dropout(layer.p, n),
        INDEX=_index(max(chunk, layer.R), n, x, target, layer.Vt),
        NEED_X=grad_x is not None,
        NEED_V=need_V,
        READ=beta != 0.0,
        **_options(tiles),
    )
    return partial_V


def _sums(layer: Layer, partials: list[Tensor], needed: list[bool]) -> list[Tensor]:
    """∂U, ∂S and ∂Vᵀ of their partial sums, each in its factor's dtype: one launch."""
    factors = (layer.U, layer.S, layer.Vt)
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip(factors, needed, strict=True)
    ]
    if any(needed):
        (U, S, V), (grad_U, grad_S, grad_V) = partials, grads
        sizes = [grad.numel() for grad in (grad_U, grad_V, grad_S)]
        sum_kernel[(sum(triton.cdiv(size, SUM_ITEMS) for size in sizes),)](
            *(U, grad_U, sizes[0], U.shape[0], layer.scale),
            *(V, grad_V, sizes[1], V.shape[0], S, grad_S, sizes[2], S.shape[0]),
            TO=element(layer.wide),
            ITEMS=SUM_ITEMS,
            **launch_options(target_backend()),
        )
    return grads


def adapter_backward_(
    grad_x: Tensor | None,
    beta: float,
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x = beta grad_x + dᵀ(K Vᵀ) in place; returns ∂U, ∂S, ∂Vᵀ; see ``ops.py``."""
    given = {} if grad_x is None else {"grad_x": grad_x}
    _check("adapter_backward_", U, S, Vt, p, seed, x=x, grad_y=grad_y, A=A, **given)
    if len(needed) != 3:
        raise RuntimeError(f"adapter_backward_: needed: found {len(needed)} flags, wanted three, for U, S and Vt.")
    if not _takes(U, grad_y, x, A, S, Vt, *given.values()):
        return _reference("adapter_backward_", grad_x, beta, grad_y, x, A, U, S, Vt, scale, p, seed, needed)
    layer = Layer(U, S, Vt, grad_y.dtype, scale, p, seed)
    with on_device_of(grad_y):
        U_, S_, V_ = _backward(layer, grad_x, beta, grad_y, x, A.contiguous(), needed)
        grads = _sums(layer, [U_, S_, V_], needed)
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
        _core(layer, A.unsqueeze(0), None, P)

    partial_Q = partial_U = none
    joined = joins_contractions(layer.R, layer.dtype)
    if need_Q and not joined:

        def project(tiles: PassTiles) -> None:
            _products(layer, grad_y, layer.U.mT, 0.0, tiles)

        tiles = _tiles("project", layer, grad_y, ("gradient",), project)
        partial_Q = _products(layer, grad_y, layer.U.mT, 0.0, tiles)
    if need_U or joined:

        def contract(tiles: PassTiles) -> None:
            _contract(layer, grad_y, P, need_Q and joined, need_U, tiles)

        tiles = _tiles("contract", layer, grad_y, (need_Q, need_U), contract)
        contracted, partial_U = _contract(layer, grad_y, P, need_Q and joined, need_U, tiles)
        partial_Q = contracted if joined else partial_Q
    if not need_Q:
        return partial_U, none, none
    K, partial_S = _core_gradient(layer, partial_Q, A, need_S, need_K)
    if not need_K or n == 0:
        return partial_U, partial_S, none

    def spread(tiles: PassTiles) -> None:
        _spread(layer, None if grad_x is None else torch.empty_like(grad_x), beta, x, K, need_V, tiles)

    tiles = _tiles("spread", layer, x, (layer.p > 0.0, need_V, grad_x is not None, beta != 0.0), spread)
    partial_V = _spread(layer, grad_x, beta, x, K, need_V, tiles)
    return partial_U, partial_S, partial_V


# ---- dropout, arguments ----------------------------------------------------------------------------------------------


def philox_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x / (1 - p) where the mask of ``seed`` keeps it, else 0: a new contiguous tensor of x's shape; see ``ops.py``."""
    if p == 0.0 or not x.numel() or x.dtype not in ELEMENTS:
        return _reference("philox_dropout", x, p, seed)
    _check_dropout("philox_dropout", p, seed)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)  # (T, n)
    T, n = rows.shape
    ROWS, COLUMNS = DROPOUT_TILE
    with on_device_of(x):
        dropout_kernel[(triton.cdiv(T, ROWS) * triton.cdiv(n, COLUMNS),)](
            *(rows, out, seed.to(x.device), T, n, *rows.stride(), _threshold(p), _inverse(p)),
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


def _check(
    operator: str, U: Tensor, S: Tensor, Vt: Tensor, p: float, seed: Tensor | None, x: Tensor, **rows: Tensor
) -> None:
    """Raise RuntimeError, as the CPU kernels do, where the arguments do not belong together."""
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
    _check_dropout(operator, p, seed)


def _takes(U: Tensor, *others: Tensor) -> bool:
    """Whether the kernels have the rank and the dtypes; S of float64 past rank 64 is more than 99 KiB."""
    dtypes = {t.dtype for t in (U, *others)}
    most = MAX_RANK // 2 if torch.float64 in dtypes else MAX_RANK
    return 0 < U.shape[1] <= most and dtypes <= ELEMENTS.keys()


def _reference(operator: str, *arguments: Any) -> Any:
    return ops.REFERENCE[operator](*arguments)


OPERATORS: dict[str, Callable[..., Any]] = {
    "philox_dropout": philox_dropout,
    "adapter_forward_": adapter_forward_,
    "adapter_product": adapter_product,
    "adapter_backward_": adapter_backward_,
}

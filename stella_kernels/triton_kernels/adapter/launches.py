"""The adapter's launches, one by one: grids, arguments and partial sums; ``operators`` puts them in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import philox
from ..launch.configuration import arithmetic, element, padded_rank, precision
from ..launch.device import target_backend
from ..launch.plan import launch, scratch
from . import configuration
from .configuration import MULTIPROCESSORS, SUM_ITEMS, PassTiles, core_precision, joins_core_gradient, launch_options
from .forward import accumulate_kernel, core_kernel, project_kernel
from .gradient import contract_kernel, core_gradient_kernel, spread_kernel, sum_kernel

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
        return scratch(shape, dtype or self.wide, self.U.device)


def _dropout(p: float) -> Arguments:
    """Compile-time switches of the mask of activations."""
    return {"DROPOUT": p > 0.0, "DROPS_ALL": p == 1.0}


def threshold_of(p: float) -> int:
    """The smallest number that keeps its element, in the upper half of an int32; of p = 1 it is not read."""
    threshold = philox.keep_threshold(p) % 2**16
    return (threshold - 2**16 if threshold >= 2**15 else threshold) * 2**16


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


def _seed(layer: Layer, x: Tensor) -> Tensor:
    if layer.p == 0.0:
        return x  # never read
    assert layer.seed is not None
    return layer.seed.to(x.device)


def strips_of(layer: Layer, x: Tensor, tiles: PassTiles) -> tuple[int, int]:
    """How many programs share the columns of a block of x's rows, and how many columns one takes."""
    T, n = x.shape
    most = triton.cdiv(n, 4 * tiles.columns)  # of four tiles at least
    wanted = max(1, min(most, _programs(tiles, x.device) // triton.cdiv(T, tiles.rows)))
    width = triton.cdiv(triton.cdiv(n, wanted), tiles.columns) * tiles.columns
    return max(1, triton.cdiv(n, width)) if n else 1, width


def launch_products(
    layer: Layer, x: Tensor, factor: Tensor, p: float, tiles: PassTiles, out: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Partial sums of d(x) factorᵀ, (strips, T, r), of a factor (r, n); or A and P to ``out``: one launch."""
    (T, n), r = x.shape, layer.r
    strips, width = strips_of(layer, x, tiles)
    partials = layer.new(strips, T, r) if out is None else layer.new(0)
    A, P = out or (partials, partials)
    launch(
        project_kernel,
        (triton.cdiv(T, tiles.rows) * strips,),
        *(x, factor, layer.S, A, P, partials, _seed(layer, x), T, n, r, width, *x.stride(), *factor.stride()),
        *(*layer.core_strides, threshold_of(p), philox.kept_scale(p)),
        **(layer.types() | layer.core() | _dropout(p)),
        INDEX=_index(max(tiles.rows, layer.R), n, x, factor),
        SPLIT=out is None,
        **_options(tiles),
    )
    return partials


def launch_core(
    layer: Layer, partials: Tensor, A: Tensor | None, P: Tensor, scale: float = 1.0, transposed: bool = False
) -> None:
    """A = ``scale`` times the sum of ``partials`` (splits, T, r), where it is wanted, and P = A Sᵀ or, ``transposed``,
    A S: one launch."""
    splits, T, r = partials.shape
    tiles = configuration.default_tiles("core", layer.R, layer.dtype, target_backend())
    strides = layer.core_strides[::-1] if transposed else layer.core_strides
    launch(
        core_kernel,
        (triton.cdiv(T, tiles.rows),),
        *(partials, layer.S, P if A is None else A, P, T, r, splits, *strides, scale),
        **layer.core(),
        KEEP=A is not None,
        **_options(tiles, columns=False),
    )


def launch_accumulate(layer: Layer, y: Tensor, bias: Tensor | None, P: Tensor, read: bool, tiles: PassTiles) -> None:
    """y + s P Uᵀ, or b + s P Uᵀ, into y: one launch."""
    T, m = y.shape
    strips = triton.cdiv(m, tiles.columns)
    chunk = _rows_of_chunk(T, strips, tiles, layer.U.device)
    launch(
        accumulate_kernel,
        (triton.cdiv(T, chunk) * strips,),
        *(y, y if bias is None else bias, P, layer.U, T, m, layer.r, chunk, *y.stride()),
        *(0 if bias is None else bias.stride(0), *layer.U.stride(), layer.scale),
        **layer.types(),
        INDEX=_index(max(chunk, m), max(m, layer.R), y, layer.U),
        READ=read,
        BIAS=bias is not None,
        **_options(tiles),
    )


def launch_contract(
    layer: Layer, grad_y: Tensor, P: Tensor, need_Q: bool, need_U: bool, tiles: PassTiles
) -> tuple[Tensor, Tensor]:
    """Partial sums of Y' U (strips, T, r) and of Y'ᵀ P (chunks, m, r): one launch, Y' read once."""
    (T, m), r = grad_y.shape, layer.r
    strips = max(1, triton.cdiv(m, tiles.columns))
    chunk = _rows_of_chunk(T, strips, tiles, layer.U.device)
    chunks = triton.cdiv(T, chunk)
    partial_Q = layer.new(strips if need_Q else 0, T, r)
    partial_U = layer.new(chunks if need_U else 0, m, r)
    launch(
        contract_kernel,
        (chunks * strips,),
        *(grad_y, P, layer.U, partial_Q, partial_U, T, m, r, chunk, *grad_y.stride(), *layer.U.stride()),
        **layer.types(),
        INDEX=_index(max(chunk, m), max(m, layer.R), grad_y, layer.U),
        NEED_Q=need_Q,
        NEED_U=need_U,
        **_options(tiles),
    )
    return partial_Q, partial_U


def launch_core_gradient(
    layer: Layer, partial_Q: Tensor, A: Tensor, need_S: bool, need_K: bool
) -> tuple[Tensor, Tensor]:
    """K = Q S (T, r) and partial sums of ∂S = Qᵀ A: one launch, two where registers do not hold both."""
    splits, T, r = partial_Q.shape
    tiles = configuration.default_tiles("core", layer.R, layer.dtype, target_backend())
    chunk = _rows_of_chunk(T, 1, tiles, layer.U.device)
    chunks = triton.cdiv(T, chunk)
    K = layer.new(T if need_K else 0, r, dtype=layer.dtype)
    partial_S = layer.new(chunks if need_S else 0, *layer.S.shape)
    if need_K and not joins_core_gradient(layer.R):
        launch_core(layer, partial_Q, None, K, layer.scale, transposed=True)
        need_K = False
    if need_S or need_K:
        launch(
            core_gradient_kernel,
            (chunks,),
            *(partial_Q, A, layer.S, K, partial_S, T, r, splits, chunk, *layer.core_strides, layer.scale),
            **layer.core(),
            NEED_S=need_S,
            NEED_K=need_K,
            **_options(tiles, columns=False),
        )
    return K, partial_S


def launch_spread(
    layer: Layer, grad_x: Tensor | None, beta: float, x: Tensor, K: Tensor, need_V: bool, tiles: PassTiles
) -> Tensor:
    """∂x = β ∂x + dᵀ(K Vᵀ) in place; partial sums of ∂Vᵀ = Kᵀ d(x), (chunks, r, n): one launch, x read once."""
    (T, n), r = x.shape, layer.r
    strips = triton.cdiv(n, tiles.columns)
    chunk = _rows_of_chunk(T, strips, tiles, layer.U.device)
    chunks = triton.cdiv(T, chunk)
    partial_V = layer.new(chunks if need_V else 0, r, n)
    target = x if grad_x is None else grad_x
    launch(
        spread_kernel,
        (chunks * strips,),
        *(x, K, layer.Vt, target, partial_V, _seed(layer, x), T, n, r, chunk),
        *(*x.stride(), *layer.Vt.stride(), *target.stride(), threshold_of(layer.p), philox.kept_scale(layer.p), beta),
        **layer.types(),
        **_dropout(layer.p),
        INDEX=_index(max(chunk, layer.R), n, x, target, layer.Vt),
        NEED_X=grad_x is not None,
        NEED_V=need_V,
        READ=beta != 0.0,
        **_options(tiles),
    )
    return partial_V


def launch_sums(layer: Layer, partials: list[Tensor], needed: list[bool]) -> list[Tensor]:
    """∂U, ∂S and ∂Vᵀ of their partial sums, each in its factor's dtype: one launch."""
    factors = (layer.U, layer.S, layer.Vt)
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip(factors, needed, strict=True)
    ]
    if any(needed):
        (U, S, V), (grad_U, grad_S, grad_V) = partials, grads
        sizes = [grad.numel() for grad in (grad_U, grad_V, grad_S)]
        launch(
            sum_kernel,
            (sum(triton.cdiv(size, SUM_ITEMS) for size in sizes),),
            *(U, grad_U, sizes[0], U.shape[0], layer.scale),
            *(V, grad_V, sizes[1], V.shape[0], S, grad_S, sizes[2], S.shape[0]),
            TO=element(layer.wide),
            ITEMS=SUM_ITEMS,
            **launch_options(target_backend()),
        )
    return grads

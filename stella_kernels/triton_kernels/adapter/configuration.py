"""Tiles of the adapter's passes over activations: defaults by padded rank and dtype, and what else is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..launch.configuration import FUSION, GREEDY, precision

SUM_ITEMS = 1024  # of a gradient, a program's share of the last sums
DROPOUT_TILE = (16, 256)
MULTIPROCESSORS = 128
LEAST = 16  # of a dimension, for tl.dot
LARGEST = 1 << 15  # elements of a factor that a program holds


@dataclass(frozen=True)
class PassTiles:
    """A tile of ``rows`` by ``columns`` at a time; rows, or columns of ``project``, are shared by ``programs``.

    More programs fill more of a GPU and leave more partial sums. They are those of a GPU of MULTIPROCESSORS, one each
    by default; another has as many in proportion, for a few more than it runs at once would take as long again.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = MULTIPROCESSORS


# (rows, columns, warps, stages) by padded rank. Wide where programs would else read factors and leave partial sums many
# times over; as large as no chip's compiler spills and 99 KiB of shared memory hold, see ``compile-report``; a float32
# product is three of tf32, and takes as many more registers.
_HALF = {
    "project": {16: (256, 64, 8, 2), 32: (256, 64, 8, 2), 64: (128, 64, 8, 3), 128: (128, 32, 8, 3)},
    "core": {16: (32, 0, 2, 2), 32: (32, 0, 4, 2), 64: (64, 0, 4, 2), 128: (16, 0, 8, 2)},
    "accumulate": {16: (32, 256, 8, 3), 32: (32, 256, 8, 3), 64: (32, 256, 8, 3), 128: (16, 256, 8, 2)},
    "contract": {16: (32, 512, 8, 2), 32: (32, 512, 8, 2), 64: (32, 256, 8, 2), 128: (64, 128, 8, 2)},
    "spread": {16: (64, 128, 8, 2), 32: (64, 128, 8, 2), 64: (64, 128, 8, 2), 128: (32, 128, 8, 2)},
}
_FLOAT32 = {
    "project": {16: (128, 32, 8, 3), 32: (128, 32, 8, 3), 64: (64, 32, 8, 3), 128: (64, 16, 8, 4)},
    "core": {16: (32, 0, 2, 2), 32: (32, 0, 4, 2), 64: (32, 0, 8, 2), 128: (16, 0, 8, 2)},
    "accumulate": {16: (32, 128, 8, 3), 32: (32, 128, 8, 3), 64: (32, 128, 8, 2), 128: (32, 64, 8, 2)},
    "contract": {16: (32, 128, 8, 3), 32: (32, 64, 8, 3), 64: (32, 128, 8, 2), 128: (32, 64, 8, 3)},
    "spread": {16: (16, 128, 8, 3), 32: (16, 128, 8, 2), 64: (16, 64, 8, 2), 128: (16, 16, 8, 2)},
}


@lru_cache(maxsize=256)
def default_tiles(kernel: str, R: int, dtype: torch.dtype, backend: str, wide: bool = False) -> PassTiles:
    """What runs where nothing was measured; float64 is to be right, and no more.

    ``wide`` says that x is wider than the layer's dtype, as in autocast: half a tile of it is then as many bytes.
    """
    if dtype == torch.float64:
        return PassTiles(16, 32, 8, 1)
    tiles = PassTiles(*(_HALF if dtype.itemsize == 2 else _FLOAT32)[kernel][R])
    if wide and kernel == "project":
        tiles = replace(tiles, columns=max(LEAST, tiles.columns // 2))
    if wide and kernel == "spread":  # half the columns spill
        tiles = replace(tiles, rows=max(LEAST, tiles.rows // 2))
    if backend == "hip" and kernel in ("accumulate", "contract", "spread"):
        # There registers hold what is fetched ahead, and a program has 64 KiB of shared memory.
        half = dtype.itemsize == 2
        parts = 4 if half and R == 128 else 2 if half or kernel == "accumulate" else 1
        return replace(tiles, columns=tiles.columns // parts, stages=1)
    return tiles


@lru_cache(maxsize=256)
def candidate_tiles(kernel: str, R: int, dtype: torch.dtype, backend: str, wide: bool = False) -> tuple[PassTiles, ...]:
    """What is measured beside the default: a few either way, none of which spills or is too large on every chip."""
    if dtype == torch.float64:
        return ()
    own = default_tiles(kernel, R, dtype, backend, wide)
    every = (
        replace(own, rows=own.rows // 2),
        replace(own, columns=own.columns // 2),
        replace(own, columns=own.columns // 2, programs=own.programs * 2),
        replace(own, columns=own.columns // 2, warps=4, programs=own.programs * 2),
        replace(own, rows=own.rows * 2, columns=own.columns // 2),
        replace(own, rows=own.rows // 2, columns=own.columns * 2),
        replace(own, programs=own.programs * 2),
        replace(own, programs=own.programs // 2),
        replace(own, stages=own.stages - 1),
        replace(own, stages=own.stages + 1),
    )
    return tuple(
        tiles
        for tiles in every
        if min(tiles.rows, tiles.columns) >= LEAST and tiles.columns * R <= LARGEST and tiles.stages
    )


def core_precision(dtype: torch.dtype, backend: str) -> str:
    """Of the products with S, of float32 sums: tf32 keeps all digits that a half type can."""
    return "tf32" if dtype.itemsize == 2 and backend == "cuda" else precision(dtype, backend)


def fuses_core(R: int, dtype: torch.dtype) -> bool:
    """Whether the product with S follows in the kernel that sums A; past that its registers do not hold both."""
    return (64 if dtype.itemsize == 2 else 32) >= R


def joins_contractions(R: int, dtype: torch.dtype) -> bool:
    """Whether Y' is read once for both Y' U and Y'ᵀ P; past that the strips that registers hold are so narrow that the
    partial sums of Y' U would be more than Y' is."""
    return (64 if dtype.itemsize == 2 else 32) >= R


def joins_core_gradient(R: int) -> bool:
    """Whether one kernel gives both K = Q S and ∂S; past that its registers do not hold both."""
    return R <= 64


def launch_options(backend: str) -> dict[str, int]:
    """Of every launch."""
    return FUSION | GREEDY if backend == "cuda" else FUSION

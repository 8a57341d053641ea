"""Tiles of the adapter's passes over activations: defaults by padded rank and dtype, and what else is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .configuration import precision

CORE_ROWS = 64  # of the kernels over (T, r) temporaries
CORE_WARPS = 4
SUM_ITEMS = 1024  # of a gradient, a program's share of the last sums
DROPOUT_TILE = (16, 256)


@dataclass(frozen=True)
class PassTiles:
    """A tile of ``rows`` by ``columns`` at a time; rows, or columns of ``project``, are shared by ``programs``.

    More programs fill more of a GPU and leave more partial sums.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 128


def default_tiles(kernel: str, R: int, dtype: torch.dtype) -> PassTiles:
    """What runs where nothing was measured."""
    half = dtype.itemsize == 2
    if kernel == "project":
        tiles = PassTiles(128, 64 if half else 32, 8, 3)
    elif kernel == "accumulate":
        tiles = PassTiles(64, 128 if half else 64, 8, 3)
    elif kernel == "contract":
        tiles = PassTiles(64, 256 if R <= 32 else 128, 8, 2) if half else PassTiles(32, 128, 8, 3)
    else:
        tiles = PassTiles(64, 128 if half and R <= 64 else 64, 8, 2)
    return tiles


def candidate_tiles(kernel: str, R: int, dtype: torch.dtype) -> tuple[PassTiles, ...]:
    """What is measured beside the default: a few either way."""
    own = default_tiles(kernel, R, dtype)
    return (
        replace(own, rows=own.rows // 2),
        replace(own, columns=own.columns // 2),
        replace(own, rows=own.rows // 2, columns=own.columns * 2),
        replace(own, programs=own.programs * 2),
        replace(own, programs=own.programs // 2),
        replace(own, stages=own.stages - 1 if own.stages > 2 else own.stages + 1),
        replace(own, warps=4),
    )


def core_precision(dtype: torch.dtype, backend: str) -> str:
    """Of the products with S, of float32 sums: tf32 keeps all digits that a half type can."""
    return "tf32" if dtype.itemsize == 2 and backend == "cuda" else precision(dtype, backend)

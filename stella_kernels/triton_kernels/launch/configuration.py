"""Sizes of tiles and numbers of warps, by rank and dtype, chosen so that nothing spills: see ``compile-report``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ... import environment

MAX_RANK = 128

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def element(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return ELEMENTS[dtype]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products and moments of factors stored as ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded_rank(r: int) -> int:
    """The tile that holds r columns: a power of two, at least 16 (the least that tl.dot takes)."""
    return max(16, triton.next_power_of_2(r))


@dataclass(frozen=True)
class Tiles:
    """Of the grouped kernels, for one padded rank R.

    ``chunk`` rows are one program's, ``block`` rows at a time; ``slab`` columns of the Gram blocks are one program's, R
    where they fit its registers, and with ``halves`` those are held as two tiles of half the columns. Where ``slab`` is
    less than R, no r × r matrix fits either: kernels that multiply by one read it anew for every ``long_block`` rows,
    ``long_slab`` of its rows at a time. The Gram blocks of what was moved, which compute no step, take
    ``moved_warps``. ``small`` and ``small64`` are the blocks of the r × r algebra.
    """

    block: int
    chunk: int
    slab: int
    halves: bool
    long_block: int
    long_slab: int
    small: int
    small64: int
    rows64: int
    warps: int
    moved_warps: int
    solve_warps: int
    items: int = 64  # of a factor, summed at a time

    def streaming(self, R: int) -> dict[str, int]:
        """Of a kernel that multiplies tiles of rows by an r × r matrix."""
        if self.slab == R:
            return {"BLOCK": self.block, "SLAB": R}
        return {"BLOCK": self.long_block, "SLAB": self.long_slab}


def tiles_for(R: int, dtype: torch.dtype) -> Tiles:
    """The defaults. A chunk of 64 R rows or more keeps the partial Gram matrices under 5 % of the factors.

    Up to rank 32 few warps share a tile: what every warp does anew, addresses and operands of products among it, is
    then done seldom, and a step issues for about as long as its bytes take.
    """
    few = R <= 32
    single = arithmetic(dtype) == torch.float32
    slab = R if few or (R == 64 and single) else 32
    warps = (2 if single else 4) if few else 8
    return Tiles(
        block=32 if R == 16 else 16,
        chunk=min(8192, max(2048, 64 * R)),
        slab=slab,
        halves=single and R in (32, 64),
        long_block=32,
        long_slab=16,
        small=16 if R == 16 or (few and not single) else 32,
        small64=16,
        rows64=16,
        warps=warps,
        moved_warps=1 if R == 16 and single else warps,
        solve_warps=(4 if R == 64 else 2 if few else 8) if single else 8,
    )


# Of every launch: a product and a sum are fused by default in Triton 3.9 and not in 3.10.
FUSION: dict[str, int] = {"enable_fp_fusion": True}
# Left alone, ptxas spills from some kernels to fit more of their blocks at once, of which there are few.
GREEDY = {"maxnreg": 255}


def precision(dtype: torch.dtype, backend: str, gradient: bool = False) -> str:
    """How float32 products are made: 'tf32x3' on NVIDIA, 'ieee' elsewhere (AMD has no tf32x3) and in float64.

    ``STELLA_KERNELS_GRADIENT_PRECISION=tf32`` takes plain tf32 for the Riemannian gradient alone, which forgives it.
    """
    if arithmetic(dtype) == torch.float64 or backend != "cuda":
        return "ieee"
    if gradient and (chosen := environment.value("STELLA_KERNELS_GRADIENT_PRECISION")):
        return chosen
    return "tf32x3"

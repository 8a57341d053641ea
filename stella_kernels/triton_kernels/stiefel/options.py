"""Launch options of the Stiefel kernels, by target: registers, fetching ahead, layouts."""

from __future__ import annotations

from ..launch.configuration import FUSION, GREEDY, Tiles
from .moves import ADAMW, POLAR, RETRACT

ATTEMPT = {"BLOCK": 16, "SLAB": 16}  # of what one program tries on all rows, seldom: a few registers
PROGRAMS = 132  # of the solve, each with a workspace
POLAR_WARPS = 8  # of its solve: what comes to it is often ill-conditioned, and then a program goes through all rows


def solve_options(backend: str) -> dict[str, int]:
    """Loads of the r × r algebra are not fetched ahead: the addresses would spill, and the matrices are in cache."""
    return {**FUSION, **GREEDY, "num_stages": 1} if backend == "cuda" else FUSION


def solve_warps(tiles: Tiles, KIND: int) -> int:
    """Few, which work on the same blocks less often: the algebra of a program is a chain of small products."""
    return POLAR_WARPS if KIND == POLAR else tiles.solve_warps


def lays_apart(R: int, arch: object) -> bool:
    """Whether the moments' product is laid out apart from the Gram blocks': sm_90 spills else at 64 columns."""
    return R == 64 and arch == 90


def advances_alone(whole: bool, halves: bool, steps: bool, bits: int, arch: object) -> bool:
    """Whether a launch of its own advances the moments: where no Gram block is ``whole`` in registers, and on sm_90
    where float32's steps are kept beside two halves of one: with them it would spill."""
    return not whole or (arch == 90 and halves and steps and bits == 32)


def sum_options(backend: str) -> dict[str, int]:
    """Of one program for each factor, of which there are few: blocks beside each other gain nothing."""
    return FUSION | GREEDY if backend == "cuda" else FUSION


def holds_halves(halves: bool, KIND: int, R: int, arch: object) -> bool:
    """Whether the Gram blocks are two tiles of half the columns, beside the default: elsewhere that would spill."""
    return halves or (arch == 120 and KIND == ADAMW and R == 128)


def gram_options(backend: str, KIND: int, R: int) -> dict[str, int]:
    """A few registers more than ptxas stops at by itself."""
    return FUSION | GREEDY if backend == "cuda" and KIND == RETRACT and R <= 32 else FUSION


def gram_warps(tiles: Tiles, KIND: int) -> int:
    """Of the Gram blocks."""
    return tiles.warps if KIND == ADAMW else tiles.moved_warps


def update_options(backend: str, KIND: int, R: int) -> dict[str, int]:
    """On sm_120 ptxas spills to fit more programs at once."""
    return FUSION | GREEDY if backend == "cuda" and KIND == RETRACT and R == 32 else FUSION

"""``python -m stella_kernels compile-report``: every kernel compiled for chips that are not here, and its resources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .compiled import CHIPS, Resources, compile_for
from .variants import RANKS, variants

HEADER = (
    f"{'kernel':<46}{'chip':<8}{'registers':>9}{'spills':>7}{'shared':>8}{'warps':>6}{'occupancy':>10}"
    f"{'tensor-core':>12}{'128-bit loads':>14}{'stores':>7}"
)


def faults(resources: Resources) -> Iterator[str]:
    """What a kernel at its defaults promises and does not keep."""
    variant, chip = resources.variant, resources.chip
    if resources.spills:
        yield f"{resources.spills} instructions spill registers ({resources.stack} bytes of stack)"
    if resources.shared > chip.block_shared:
        yield f"{resources.shared} bytes of shared memory, the chip has {chip.block_shared}"
    if variant.products and not resources.tensor_core:
        yield "no tensor-core instruction"
    if variant.wide and not resources.wide_loads:
        yield "no 128-bit load"


def line(resources: Resources) -> str:
    """A row of the table."""
    r = resources
    return (
        f"{r.variant.name:<46}{r.chip.name:<8}{r.registers:>9}{r.spills:>7}{r.shared:>8}{r.warps:>6}"
        f"{r.occupancy:>10.0%}{r.tensor_core:>12}{r.wide_loads:>14}{r.wide_stores:>7}"
    )


def report(chips: Sequence[str] = tuple(CHIPS), ranks: Sequence[int] = RANKS, only: str = "") -> int:
    """Compile and print; 1 where a kernel does not keep what its defaults promise."""
    print(HEADER, flush=True)
    missed = 0
    for name in chips:
        chip = CHIPS[name]
        for variant in variants(tuple(ranks), chip.target.backend, chip.target.arch):
            if only not in variant.name:
                continue
            resources = compile_for(variant, chip)
            found = list(faults(resources))
            missed += bool(found)
            print(line(resources) + "".join(f"\n    MISSED {fault}" for fault in found), flush=True)
    print(f"{missed} kernels miss a promise" if missed else "every kernel keeps its promises")
    return int(missed > 0)

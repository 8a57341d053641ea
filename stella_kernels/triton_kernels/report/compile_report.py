"""``python -m stella_kernels compile-report``: every kernel compiled for chips that are not here, and its resources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .adapter_variants import adapter_candidates
from .compiled import CHIPS, Resources, compile_for
from .variants import RANKS, variants

HEADER = (
    f"{'kernel':<60}{'chip':<8}{'registers':>9}{'spills':>7}{'shared':>8}{'warps':>6}{'occupancy':>10}"
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
        f"{r.variant.name:<60}{r.chip.name:<8}{r.registers:>9}{r.spills:>7}{r.shared:>8}{r.warps:>6}"
        f"{r.occupancy:>10.0%}{r.tensor_core:>12}{r.wide_loads:>14}{r.wide_stores:>7}"
    )


def report(
    chips: Sequence[str] = tuple(CHIPS), ranks: Sequence[int] = RANKS, only: str = "", candidates: bool = False
) -> int:
    """Compile and print; 1 where a kernel does not keep what its defaults promise, or a candidate serves no chip."""
    print(HEADER, flush=True)
    missed = compiled = 0
    for name in chips:
        chip = CHIPS[name]
        for variant in variants(tuple(ranks), chip.target.backend, chip.target.arch):
            if only not in variant.name:
                continue
            resources = compile_for(variant, chip)
            found = list(faults(resources))
            compiled += 1
            missed += bool(found)
            print(line(resources) + "".join(f"\n    MISSED {fault}" for fault in found), flush=True)
    if not compiled:
        print(f"--kernels: found no kernel whose name contains {only!r} ; the whole report has the names")
        return 2
    print(f"{missed} kernels miss a promise" if missed else "every kernel keeps its promises")
    useless = report_candidates(chips, ranks, only) if candidates else []
    return int(missed > 0 or bool(useless))


def report_candidates(chips: Sequence[str], ranks: Sequence[int], only: str) -> list[str]:
    """Compile what autotuning may choose on a GPU, and print what it takes; names of those that serve no chip.

    Such a kernel may spill, since it is chosen only where it is fastest, and where it does not fit it is passed over.
    """
    verdicts: dict[str, list[str]] = defaultdict(list)
    for name in chips:
        chip = CHIPS[name]
        for R in ranks:
            for dtype in (torch.bfloat16, torch.float32):
                for variant in adapter_candidates(R, dtype, chip.target.backend):
                    if only not in variant.name:
                        continue
                    try:
                        resources = compile_for(variant, chip)
                    except (OutOfResources, CompilationError, PTXASError) as error:
                        verdict = f"passed over: {type(error).__name__}"
                        print(f"{variant.name:<60}{chip.name:<8}{verdict}", flush=True)
                    else:
                        fits = resources.shared <= chip.block_shared and resources.occupancy > 0.0
                        verdict = "spills" if resources.spills else "" if fits else "does not fit"
                        print(f"{line(resources)}  {verdict}".rstrip(), flush=True)
                    verdicts[variant.name].append(verdict)
    useless = [name for name, found in verdicts.items() if all(found)]
    for name in useless:
        print(f"MISSED {name}: of no use to any of {', '.join(chips)}")
    clean = sum(not any(found) for found in verdicts.values())
    print(f"{len(verdicts)} candidates: {clean} fit and spill nowhere, {len(useless)} are of no use")
    return useless

"""The adapter's Triton kernels compiled for real chips: what their defaults promise, and what autotuning may try."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

# Of each chip one rank; ``compile-report`` does everything.
RANKS = {"sm_80": 64, "sm_89": 128, "sm_90": 128, "sm_100": 32, "sm_120": 16}
PARTS = ("project", "accumulate", "contract", "spread")


@pytest.mark.pinned_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "chip", [pytest.param(c, marks=[pytest.mark.whole] * (c not in ("sm_80", "sm_90"))) for c in RANKS]
)
def test_compiled_kernels_keep_the_promises_of_their_defaults(chip: str) -> None:
    from stella_kernels.triton_kernels.report.adapter_variants import adapter_variants
    from stella_kernels.triton_kernels.report.compile_report import faults
    from stella_kernels.triton_kernels.report.compiled import CHIPS, compile_for

    missed, compiled = [], 0
    for dtype in (torch.bfloat16, torch.float32):
        for variant in adapter_variants(RANKS[chip], dtype):
            resources = compile_for(variant, CHIPS[chip])
            assert 0.0 < resources.occupancy <= 1.0
            missed += [f"{variant.name}: {fault}" for fault in faults(resources)]
            compiled += 1
    assert compiled >= 14
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_no_candidate_is_smaller_than_a_product_takes(dtype: torch.dtype, backend: str) -> None:
    from stella_kernels.triton_kernels.adapter.configuration import candidate_tiles, default_tiles

    for part in PARTS:
        for R in (16, 32, 64, 128):
            candidates = candidate_tiles(part, R, dtype, backend)
            assert len(candidates) >= (0 if dtype == torch.float64 else 3)
            for tiles in (default_tiles(part, R, dtype, backend), *candidates):
                assert min(tiles.rows, tiles.columns, tiles.programs) >= 16
                assert tiles.warps in (4, 8)
                assert tiles.stages >= 1


def test_every_candidate_can_be_compiled_ahead() -> None:
    """Each is reported once, by a name of its own, whatever number of programs it runs as."""
    from stella_kernels.triton_kernels.adapter.configuration import candidate_tiles, default_tiles
    from stella_kernels.triton_kernels.report.adapter_variants import adapter_candidates

    for R in (16, 128):
        variants = list(adapter_candidates(R, torch.bfloat16))
        assert len({variant.name for variant in variants}) == len(variants)
        for part in PARTS:
            default = default_tiles(part, R, torch.bfloat16, "cuda")
            reported = {
                (v.constants["ROWS"], v.constants["COLUMNS"], v.warps, v.constants["STAGES"])
                for v in variants
                if v.kernel.fn.__name__ == f"{part}_kernel"
            }
            measured = {
                (t.rows, t.columns, t.warps, t.stages) for t in candidate_tiles(part, R, torch.bfloat16, "cuda")
            }
            assert reported == measured - {(default.rows, default.columns, default.warps, default.stages)}

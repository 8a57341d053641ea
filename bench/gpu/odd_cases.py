"""``python -m bench.gpu.odd_cases``: small calls of every operator, of sizes that are multiples of nothing.

For compute-sanitizer, which slows a kernel down a hundredfold: what is computed is looked at elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.gpu import rehearsal
from bench.gpu.setting import Setting
from bench.gpu.stages.verify import implementation_of
from stella_kernels.verification.case_table import Case
from stella_kernels.verification.judge import check

_LIST, _TOY = ((41, 7), (7, 7), (130, 33), (3, 1)), ((21, 5), (3, 1))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def odd_cases(toy: bool = False) -> list[Case]:
    """Operators in turn: both storages and gaps, r = 1, ranks past and below whole vectors; few for an interpreter."""
    made, factors = [], _TOY if toy else _LIST
    for index, dtype in enumerate(_DTYPES[:1] if toy else _DTYPES):
        storage = ("columns", "rows", "strided")[index]
        made += [
            Case("adapter_forward_", "adapter", ((33, 65, 47, 5),), dtype, storage, dropout=0.3),
            Case("stella_adamw_", "gaussian", factors, dtype, storage, 0.2),
            Case("adapter_backward_", "adapter", ((33, 65, 47, 5),), dtype, storage, dropout=0.3),
            Case("riemannian_gradient_", "gaussian", factors, dtype, storage),
            Case("project_retract_", "step", factors, dtype, storage, scale=0.2),
            Case("polar", "gaussian", (factors[-2],), dtype, storage),
            Case("adapter_product", "adapter", ((5, 7, 9, 1),), dtype, storage, diagonal=True),
            Case("philox_dropout", "mask", ((31, 17),), dtype, dropout=0.9),
        ]
    return made


def main() -> None:
    """Run as many as there is time for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    given = parser.parse_args()
    if given.rehearse:
        rehearsal.serve_interpreted()
    setting = Setting("sanitizer", Path(), given.rehearse, given.seconds)
    implementation = implementation_of(setting)
    for case in odd_cases(given.rehearse)[: 3 if given.rehearse else None]:
        if setting.left < 0:
            break
        result = check(case, "triton", implementation)
        print(f"case {case.name}: error {result.error:.1e}", flush=True)
    if not given.rehearse:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

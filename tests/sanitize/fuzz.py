"""Random calls of every operator: ``python -m tests.sanitize.fuzz --seed S --cases N`` or ``--case SEED:INDEX``.

A case is made from its seed and index alone. ``--journal`` holds the index of the running one, so that whoever started
this process knows which case ended it. The judgement needs no sanitizer; ``sanitized.py`` runs it under those.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from random import Random

import torch

from stella_kernels.operators.signatures import OPERATORS
from tests.sanitize import adapter, stiefel
from tests.sanitize.case import Call, Complaints
from tests.sanitize.faults import break_one

_MAKERS = {name: getattr(stiefel, name, None) or getattr(adapter, name) for name in OPERATORS}


def make(seed: int, index: int) -> Call:
    """Case ``index`` of ``seed``."""
    random = Random(f"{seed}:{index}")
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    call = _MAKERS[random.choice(OPERATORS)](random, generator)
    call.threads = random.choice((1, 1, 2, 3))
    return break_one(random, call) if random.random() < 0.2 else call


def judged(seed: int, index: int, show: bool = False) -> Complaints:
    """What is wrong with a case."""
    call = make(seed, index)
    if show:
        print(f"{seed}:{index} {call}", flush=True)
    try:
        return [f"{seed}:{index} {call}: {what}" for what in call.run()]
    except Exception:
        return [f"{seed}:{index} {call}: {traceback.format_exc()}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="index of the first")
    parser.add_argument("--every", type=int, default=1, help="distance of the indices")
    parser.add_argument("--case", metavar="SEED:INDEX", help="this one alone, with what it is")
    parser.add_argument("--journal", type=Path, help="where the index of the running case is written")
    given = parser.parse_args()
    if given.case:
        seed, index = map(int, given.case.split(":"))
        complaints = judged(seed, index, show=True)
        print("\n".join(complaints) or "nothing is wrong")
        return bool(complaints)
    failed = 0
    journal = given.journal.open("w") if given.journal else None
    for index in range(given.first, given.cases, given.every):
        if journal:
            journal.seek(0)
            journal.write(f"{index}\n")
            journal.flush()
        complaints = judged(given.seed, index)
        failed += bool(complaints)
        for complaint in complaints:
            print(complaint, flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())

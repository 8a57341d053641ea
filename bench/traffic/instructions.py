"""``python -m bench.traffic.instructions FOLDER RANKS``: instructions that the kernels issue, beside their bytes.

Their PTX, compiled for sm_80, is executed by the emulator of ``tests/ptx``, which counts instructions of warps. One of
PTX is one of the machine's or fewer: ptxas joins some, as both halves of a product of integers. Counts are of small
shapes, on the line through two of which full size lies: of a factor's height, and of a layer's tokens. A layer's are in
proportion to its width, since a kernel's programs take strips of columns.

Bytes are those that must move, each element of an operand once. Those of tables, coefficients and partial sums are not
among them; ``stiefel.py`` and ``adapter.py`` count them.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.ptx import build
from bench.traffic.adapter import LAYERS as LAYER_SHAPES
from bench.traffic.adapter import TOKENS
from bench.traffic.counting import A100, IPC
from bench.traffic.stiefel import LAYERS, adamw_arguments, heights, stored

HEIGHTS = (1024, 4096)  # of the factors that are counted
WIDTH, ROWS = 4096, (512, 1024)  # of the layers, m = n; as few programs then take as many columns as at full size
WANTED_OF_BYTES, WANTED_RANKS = 1.5, (16, 32)
WANTED_SOLVE, SOLVE_RANK = 0.05, 64  # of the step's issue
# Words of an element, by operator and kernel: Y, ∇ and moments read and written.
WORDS = {
    "stella_adamw_": {"coupling_kernel": 2, "gram_kernel": 6, "update_kernel": 4},
    "project_retract_": {"gram_kernel": 2, "update_kernel": 3},
    "riemannian_gradient_": {"coupling_kernel": 2, "subtract_kernel": 3},
}
# Bytes of an element of x, y or their gradients in a half type, by kernel.
ELEMENT_BYTES = {"project_kernel": 2, "accumulate_kernel": 4, "contract_kernel": 2, "spread_kernel": 6}

Counted = Counter[str]  # instructions of warps by kernel


def operators() -> Mapping[str, Callable[..., Any]]:
    """Those of Triton, emulated on tensors of the CPU. For a process of its own."""
    os.environ["STELLA_PTX_LIBRARIES"] = str(build("emulator"))
    from tests.ptx import emulator

    return emulator.operators()


def issued(call: Callable[[], object]) -> Counted:
    """Instructions of the launches of a call."""
    from tests.ptx import emulator

    with emulator.unkind(0):
        launches = emulator.observed(call)[1]
    found: Counted = Counter()
    for launch in launches:
        found[launch.kernel] += launch.instructions
    return found


def on_the_line(few: int, some: int, wanted: int, count: Callable[[int], Counted]) -> Counted:
    """The counts at ``wanted`` from those at two sizes."""
    low, high = count(few), count(some)
    return Counter({k: round(low[k] + (high[k] - low[k]) * (wanted - few) / (some - few)) for k in high})


def of_factor(name: str, n: int, r: int, transposed: bool, given: bool = False) -> Counted:
    """Of one operator on one float32 factor of the height."""
    operator = operators()[name]
    torch.manual_seed(0)
    if name == "stella_adamw_":
        return issued(lambda: operator(*adamw_arguments(n, r, transposed, given)))
    Y, other = (stored(torch.linalg.qr(torch.randn(n, r)).Q, transposed) for _ in range(2))
    if name == "riemannian_gradient_":
        return issued(lambda: operator([other], [Y], []))
    return issued(lambda: operator([Y + 1e-2 * other], [Y], [1.0], "auto"))


def of_step(r: int, given: bool) -> Counted:
    """Of the fused AdamW step of all factors of the model."""
    total: Counted = Counter()
    for (n, transposed), count in heights().items():
        found = on_the_line(*HEIGHTS, n, lambda rows, t=transposed: of_factor("stella_adamw_", rows, r, t, given))
        for kernel, instructions in found.items():
            total[kernel] += LAYERS * count * instructions
    return total


def of_layer(rows: int, width: int, r: int, dropout: float) -> Counted:
    """Of the adapter's forward and backward in bfloat16 with float32 factors, m = n = ``width``."""
    torch.manual_seed(0)
    x, y, grad_y = (torch.randn(rows, width, dtype=torch.bfloat16) for _ in range(3))
    U, S, Vt, seed = torch.randn(width, r), torch.randn(r, r), torch.randn(r, width), torch.tensor(1)

    def step() -> None:
        A = operators()["adapter_forward_"](y, x, U, S, Vt, 1.0, dropout, seed)
        last = (1.0, dropout, seed, [True] * 3)
        operators()["adapter_backward_"](torch.zeros_like(x), 1.0, grad_y, x, A, U, S, Vt, *last)

    return issued(step)


def of_full_layer(m: int, n: int, r: int, dropout: float) -> Counted:
    """At TOKENS and the layer's widths."""
    found = on_the_line(*ROWS, TOKENS, lambda rows: of_layer(rows, WIDTH, r, dropout))
    for kernel in ELEMENT_BYTES:
        found[kernel] = found[kernel] * (n if kernel in ("project_kernel", "spread_kernel") else m) // WIDTH
    return found


def _line(label: str, r: int, kernel: str, instructions: float, moved: float) -> tuple[str, float]:
    issue, bytes_ = A100.issue_seconds(instructions), moved / A100.bandwidth
    ratio = issue / bytes_
    times = f"{1e6 * issue:10.2f}{1e6 * bytes_:10.2f}{ratio:7.2f}"
    return f"{label:<29}{r:4d} {kernel:<20}{instructions:12.0f}{times}", ratio


def report(ranks: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """Count and print; counts for JSON, and whether every promise was kept."""
    print(
        f"\nCounted, not timed: instructions of the kernels' PTX, and the time they take to issue at IPC {IPC} on an "
        f"{A100.name},\nbeside that of the bytes that must move. Factors of {HEIGHTS[1]} rows, float32, by rows and by "
        f"columns; a layer of {WIDTH} × {WIDTH},\n{ROWS[1]} tokens, bfloat16.\n"
        f"{'':<29}{'r':>4} {'kernel':<20}{'instructions':>12}{'issue us':>10}{'bytes us':>10}{'ratio':>7}"
    )
    verdicts = list(_rows(ranks))
    steps: dict[str, dict[str, Counted]] = {}
    for r in ranks:
        steps[str(r)] = {kind: of_step(r, kind == "coupling given") for kind in ("coupling computed", "coupling given")}
        step = steps[str(r)]["coupling computed"]
        share = step["solve_kernel"] / step.total()
        text = f"r = {r}: the solve issues {share:.1%} of the step's instructions"
        if r == SOLVE_RANK:
            verdicts.append((share <= WANTED_SOLVE, f"{text} (wanted: at most {WANTED_SOLVE:.0%})"))
        else:
            print(f"{text}, {step.total() / 1e6:.0f} million")
    layers = {name: {str(r): of_full_layer(*shape, r, 0.0) for r in ranks} for name, shape in LAYER_SHAPES.items()}
    for met, text in verdicts:
        print(f"    {'met   ' if met else 'MISSED'} {text}")
    return {"step": steps, "adapter": layers}, all(met for met, _ in verdicts)


def _rows(ranks: Sequence[int]) -> Iterator[tuple[bool, str]]:
    for r in ranks:
        for name, words in WORDS.items():
            for transposed in (False, True):
                found = of_factor(name, HEIGHTS[1], r, transposed)
                for kernel, count in words.items():
                    label = f"{name} {'columns' if transposed else 'rows'}"
                    text, ratio = _line(label, r, kernel, found[kernel], 4 * count * HEIGHTS[1] * r)
                    print(text, flush=True)
                    if r in WANTED_RANKS and kernel != "subtract_kernel":
                        yield ratio <= WANTED_OF_BYTES, f"{label}, r = {r}, {kernel}: {ratio:.2f} (wanted: at most 1.5)"
                if "solve_kernel" in found and not transposed:
                    print(f"{name:<29}{r:4d} {'solve_kernel':<20}{found['solve_kernel']:12d}")
        for dropout in (0.0, 0.1):
            found = of_layer(ROWS[1], WIDTH, r, dropout)
            for kernel, size in ELEMENT_BYTES.items():
                label = f"adapter, dropout {dropout}"
                text, ratio = _line(label, r, kernel, found[kernel], size * ROWS[1] * WIDTH)
                print(text, flush=True)
                if r in WANTED_RANKS and dropout and kernel != "accumulate_kernel":
                    yield ratio <= WANTED_OF_BYTES, f"{label}, r = {r}, {kernel}: {ratio:.2f} (wanted: at most 1.5)"


def main() -> int:
    """Print the table and write the counts; 1 where a promise was missed."""
    torch.set_num_threads(1)
    operators()
    output = Path(sys.argv[1])
    counts, kept = report([int(rank) for rank in sys.argv[2:]])
    output.mkdir(parents=True, exist_ok=True)
    (output / "instructions.json").write_text(json.dumps(counts, indent=1) + "\n")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())

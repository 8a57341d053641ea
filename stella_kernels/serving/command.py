"""``python -m stella_kernels export`` and ``import``."""

from __future__ import annotations

import argparse
import importlib.util
import time
from typing import Any

from .export import DTYPES, EXTRAS
from .files import export_adapter, import_adapter


def add_commands(commands: Any) -> None:
    """Add the two to the subparsers of the command line."""
    out = commands.add_parser(
        "export",
        help="a StelLA adapter as a LoRA adapter, for servers",
        description="Write the StelLA adapter of one folder as a LoRA adapter, exactly, into another.",
    )
    back = commands.add_parser(
        "import",
        help="a LoRA adapter as a StelLA adapter, to go on training it",
        description="Write the LoRA adapter of one folder as a StelLA adapter of the same rank, exactly, into another.",
    )
    for command in (out, back):
        command.add_argument("adapter_dir", metavar="ADAPTER_DIR", help="the folder that PEFT saved the adapter to")
        command.add_argument("out_dir", metavar="OUT_DIR", help="the folder to write")
    out.add_argument("--rank", type=_rank, help="cut to this rank, or (0.99) this share of the squared singular values")
    out.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the tensors (default: float32)")
    out.add_argument(
        "--rank-pattern", action="store_true", help="leave ranks that differ; PEFT reads that, llama.cpp does not"
    )
    out.add_argument(
        "--also", nargs="+", choices=EXTRAS, default=(), help="write these for PEFT, though few servers read them"
    )
    back.add_argument("--diagonal", action="store_true", help="store S as its singular values (stella_diag_s)")


def run(parsed: argparse.Namespace) -> int:
    """Do what was asked; 0, or 2 with a message where it cannot be done."""
    if importlib.util.find_spec("safetensors") is None:
        print(f"{parsed.command}: the package 'safetensors' is not installed; pip install safetensors")
        return 2
    start = time.perf_counter()
    try:
        if parsed.command == "export":
            report = export_adapter(
                parsed.adapter_dir,
                parsed.out_dir,
                rank=parsed.rank,
                dtype=DTYPES[parsed.dtype],
                rank_pattern=parsed.rank_pattern,
                also=parsed.also,
            )
            print(report)
        else:
            ranks = sorted(set(import_adapter(parsed.adapter_dir, parsed.out_dir, diagonal=parsed.diagonal).values()))
            print(f"StelLA adapter of rank {', '.join(map(str, ranks))}")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{parsed.command}: {error}")
        return 2
    print(f"written to {parsed.out_dir} in {time.perf_counter() - start:.1f} s")
    return 0


def _rank(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)

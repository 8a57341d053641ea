"""``python -m stella_kernels``: what is here and whether it is right; adapters as servers read them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time

from .machine import info
from .operators import backends
from .serving import command as serving_command
from .verification.case_table import cases
from .verification.judge import Result, check, implementations
from .version import __version__


def _table(results: list[Result]) -> list[str]:
    """A line for each backend, operator, kind and dtype: how many cases, and the one nearest to its tolerance."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        case = result.case
        group = (result.backend, case.operator, case.kind, str(case.dtype).removeprefix("torch."))
        groups.setdefault(group, []).append(result)
    header = (
        f"{'backend':<10}{'operator':<22}{'data':<18}{'dtype':<10}{'cases':>5}  {'error':>9}{'tolerance':>11}  worst"
    )
    lines = [header, "-" * len(header)]
    for key, members in groups.items():
        worst = max(members, key=lambda result: (not result.passed, result.ratio))
        verdict = "" if worst.passed else "  MISS"
        lines.append(
            f"{key[0]:<10}{key[1]:<22}{key[2]:<18}{key[3]:<10}{len(members):>5}  {worst.error:>9.1e}"
            f"{worst.tolerance:>11.1e}  {worst.what[:60]}{verdict}"
        )
    return lines


def verify(quick: bool) -> int:
    """Run every backend of this machine over the table of cases; 1 where an error exceeds its tolerance."""
    start = time.perf_counter()
    results = [
        check(case, backend, implementation)
        for backend, implementation in implementations().items()
        for case in cases(quick)
        if case.operator in implementation
    ]
    print("\n".join(_table(results)))
    missed = [result for result in results if not result.passed]
    for result in missed:
        print(
            f"MISS {result.backend} {result.case.name}: {result.what}: "
            f"error {result.error:.2e}, tolerance {result.tolerance:.2e}"
        )
    for backend in backends.backends():
        if not backend.available:
            print(f"backend {backend.name!r} was not run: {backend.why_not}")
    seconds = time.perf_counter() - start
    print(f"{len(results) - len(missed)} of {len(results)} cases within tolerance, {seconds:.0f} s")
    return 1 if missed else 0


def compile_report(chips: list[str] | None, ranks: list[int] | None, kernels: str, candidates: bool) -> int:
    """Print what each Triton kernel takes on each chip; 1 where one breaks a promise, 2 without Triton."""
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed, so that nothing can be compiled; pip install triton")
        return 2
    module = importlib.import_module("stella_kernels.triton_kernels.report.compile_report")
    if unknown := sorted(set(chips or ()) - set(module.CHIPS)):
        print(f"--chips: found {' '.join(unknown)}, wanted some of {' '.join(module.CHIPS)}")
        return 2
    return int(module.report(chips or tuple(module.CHIPS), ranks or module.RANKS, kernels, candidates))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stella_kernels",
        description="What this machine has, and whether what it computes is right; adapters as servers read them.",
        epilog="Start with info, then verify. Benchmarks are run from a checkout: python -m bench --help. "
        "COMMAND --help tells of a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"stella_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    about = commands.add_parser("info", help="what this machine has and which backend serves which operator")
    about.add_argument("--json", action="store_true", help="as JSON")
    proof = commands.add_parser("verify", help="every available backend against the float64 reference")
    proof.add_argument("--quick", action="store_true", help="a part of the table that still reaches every path")
    compiled = commands.add_parser("compile-report", help="every Triton kernel compiled for chips that are not here")
    compiled.add_argument("--chips", nargs="+", help="sm_80 sm_89 sm_90 sm_100 sm_120 gfx942 (default: all)")
    compiled.add_argument("--ranks", nargs="+", type=int, choices=(16, 32, 64, 128), help="padded ranks (default: all)")
    compiled.add_argument("--kernels", default="", help="only those whose name contains this")
    compiled.add_argument("--candidates", action="store_true", help="also what autotuning may choose on a GPU")
    serving_command.add_commands(commands)
    parsed = parser.parse_args(arguments)
    if parsed.command in ("export", "import"):
        return serving_command.run(parsed)
    if parsed.command is None:
        parser.print_help()
        return 0
    if parsed.command == "compile-report":
        return compile_report(parsed.chips, parsed.ranks, parsed.kernels, parsed.candidates)
    return info(parsed.json) if parsed.command == "info" else verify(parsed.quick)


def _for_a_pipe() -> int:
    """``main`` for a shell: a reader that has seen enough, as ``head`` has, is no error of ours."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's own flush complains
        return 141  # as a shell reports it of other commands: 128 + SIGPIPE


if __name__ == "__main__":
    sys.exit(_for_a_pipe())

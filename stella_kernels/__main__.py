"""``python -m stella_kernels``: what is here and whether it is right; adapters as servers read them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

from .environment import VARIABLES
from .operators import backends
from .operators.signatures import OPERATORS
from .serving import command as serving_command
from .verification.case_table import cases
from .verification.judge import Result, check, implementations
from .version import __version__


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError as error:
        return f"not available: {error}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def describe() -> dict[str, object]:
    """What ``info`` prints, as plain values."""
    native = backends.build_info()
    gpus = _gpus()
    build = None
    if native is not None:
        build = {
            "compiler": native.compiler,
            "torch at build": native.torch_at_build,
            "instruction sets built": native.instruction_sets(),
            "instruction set chosen": native.instruction_set(),
            "vector bytes": native.vector_bytes(),
        }
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return {
        "stella_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{_processor()} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "native build": build,
        "triton": _triton(),
        "gpus": gpus,
        "environment": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "backends": {
            b.name: "available" if b.available else f"not available: {b.why_not}" for b in backends.backends()
        },
        "operators": {
            device: {
                operator: {
                    "backend": backends.serving(operator, device),
                    "why not": backends.passed_over(operator, device),
                }
                for operator in OPERATORS
            }
            for device in devices
        },
    }


def info(as_json: bool) -> int:
    """Print what this machine has and which backend serves which operator."""
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    for key in ("stella_kernels", "python", "torch", "processor", "threads", "triton"):
        print(f"{key:<16}{facts[key]}")
    gpus, build, environment = facts["gpus"], facts["native build"], facts["environment"]
    assert isinstance(gpus, list)
    print(f"{'gpus':<16}{', '.join(gpus) or 'none that torch can use'}")
    print(f"{'native build':<16}{'none' if build is None else ''}".rstrip())
    for key, value in build.items() if isinstance(build, dict) else ():
        print(f"  {key:<24}{', '.join(value) if isinstance(value, list) else value}")
    print("environment")
    assert isinstance(environment, dict)
    for key, variable in VARIABLES.items():
        found = environment.get(key, f"not set ({variable.default})" if variable.default else "not set")
        choices = f" ({' | '.join(variable.choices)})" if variable.choices else ""
        print(f"  {key:<34}{found:<16}  {variable.meaning}{choices}")
    for title in ("backends", "operators"):
        print(title)
        section = facts[title]
        assert isinstance(section, dict)
        for key, value in section.items():
            if title == "backends":
                print(f"  {key:<24}{value}")
                continue
            for operator, served in value.items():
                print(f"  {key} {operator:<24}{served['backend']}")
                for other, reason in served["why not"].items():
                    print(f"      not {other}: {reason}")
    return 0


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

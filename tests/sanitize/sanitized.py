"""Python with the sanitized library: a copy of the package and of the tests with that library in it, in processes of
their own. ``python -m tests.sanitize.sanitized FOLDER --cases N`` fuzzes every instruction set that is there.

FOLDER is where CMake built with ``STELLA_KERNELS_SANITIZE=address,undefined`` (``make sanitize``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Fresh memory is NaN, so that what is read before it is written shows in the results; CPython's own leaks are not ours.
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255:quarantine_size_mb=64",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "STELLA_KERNELS_BACKEND": "cpu",
    "OMP_WAIT_POLICY": "passive",
}
_MOST_ENDS = 40  # of processes, after which a run is given up


def _runtime(name: str) -> str:
    """A library of the compiler's."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def instruction_sets(folder: Path) -> list[str]:
    """Those of the build that this processor has, fewest vectors first."""
    (line,) = (t for t in (folder / "CMakeCache.txt").read_text().splitlines() if "_INSTRUCTION_SETS:" in t)
    built = ["baseline", *filter(None, line.split("=")[1].split(";"))]
    program = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    capable = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    have = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}.get(capable, [])
    return [name for name in built if name == "baseline" or name in have]


class Sanitized:
    """The copy, made anew in ``folder / "copy"``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "copy"
        shutil.rmtree(self.folder, ignore_errors=True)
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("stella_kernels", "tests"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        shutil.copy(folder / "_cpu.so", self.folder / "stella_kernels")
        # The C++ library as well: its throw is looked up as the process starts, and Python is not linked with it.
        preload = " ".join(map(_runtime, ("libasan.so", "libstdc++.so")))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("STELLA_KERNELS_")}
        self._environment = inherited | _OPTIONS | {"LD_PRELOAD": preload, "PYTHONPATH": str(self.folder)}

    def start(self, isa: str, *arguments: str, lines: bool = True) -> subprocess.Popen[str]:
        """``python ARGUMENTS`` there; reports name lines of source, which takes a second each, or libraries alone."""
        environment = self._environment | {"STELLA_KERNELS_ISA": isa}
        if not lines:
            environment["ASAN_OPTIONS"] += ":symbolize=0"
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, isa: str, *arguments: str, lines: bool = True) -> tuple[int, str]:
        process = self.start(isa, *arguments, lines=lines)
        text, _ = process.communicate()
        return process.returncode, text


@dataclass
class _Share:
    """Every ``every``-th case from the first, by processes one after the other: a case that ends one is reported."""

    sanitized: Sanitized
    isa: str
    seed: int
    first: int
    cases: int
    every: int
    found: list[str] = field(default_factory=list)
    ends: int = 0

    def __post_init__(self) -> None:
        self._journal = self.sanitized.folder / f"journal-{self.isa}-{self.first}"
        self._start(self.first)

    def _start(self, first: int) -> None:
        self._journal.write_text(f"{first}\n")
        numbers = {"--seed": self.seed, "--first": first, "--cases": self.cases, "--every": self.every}
        given = [str(word) for pair in numbers.items() for word in pair]
        self._process = self.sanitized.start(
            self.isa, "-m", "tests.sanitize.fuzz", *given, "--journal", str(self._journal)
        )

    def finish(self) -> None:
        while True:
            text, _ = self._process.communicate()
            if self._process.returncode == 0:
                return
            if self._process.returncode == 1 and "Sanitizer" not in text and "runtime error" not in text:
                self.found += text.splitlines()
                return
            index = int(self._journal.read_text().split()[0])
            self.ends += 1
            report = "\n    ".join(line[:240] for line in text.splitlines()[:200] if _telling(line))
            self.found.append(f"{self.seed}:{index} ended the process ({self._process.returncode}):\n    {report}")
            if self.ends == _MOST_ENDS:
                self.found.append(f"given up after {_MOST_ENDS} processes")
                return
            self._start(index + self.every)


def _telling(line: str) -> bool:
    return "rror" in line or "csrc" in line or line.startswith(("READ", "WRITE", "SUMMARY")) or "off by" in line


def fuzz(sanitized: Sanitized, isa: str, seed: int, cases: int, workers: int = 2) -> list[str]:
    """What is wrong with cases 0 to ``cases`` of ``seed``."""
    shares = [_Share(sanitized, isa, seed, first, cases, workers) for first in range(min(workers, cases))]
    for share in shares:
        share.finish()
    return [line for share in shares for line in share.found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize.sanitized", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--isa", action="append", help="one of them, several times for several")
    parser.add_argument("--case", metavar="SEED:INDEX", help="this one alone")
    given = parser.parse_args()
    sanitized = Sanitized(given.folder.resolve())
    failed = False
    for isa in given.isa or instruction_sets(given.folder):
        start = time.monotonic()
        if given.case:
            status, text = sanitized.run(isa, "-m", "tests.sanitize.fuzz", "--case", given.case)
            print(f"{isa}: {text}", flush=True)
            failed |= status != 0
            continue
        found = fuzz(sanitized, isa, given.seed, given.cases)
        print("\n".join(found), end="\n" if found else "", flush=True)
        seconds = time.monotonic() - start
        print(f"{isa}: {given.cases} cases, {len(found)} reports, {seconds:.0f} s", flush=True)
        failed |= bool(found)
    return failed


if __name__ == "__main__":
    sys.exit(main())

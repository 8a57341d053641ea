"""The CPU library under sanitizers. ``make sanitize`` builds and runs all of this, ``make test`` what is not slow."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.sanitize.sanitized import Sanitized, fuzz, instruction_sets

if "STELLA_SANITIZED" not in os.environ:
    pytest.skip("STELLA_SANITIZED: wanted the folder that make sanitize builds in", allow_module_level=True)

FOLDER = Path(os.environ["STELLA_SANITIZED"]).resolve()
CASES = int(os.environ.get("STELLA_SANITIZED_CASES", "300"))
SETS = instruction_sets(FOLDER / "address")
THREADS = FOLDER / "thread" / "threads"


@pytest.fixture(scope="module")
def sanitized() -> Sanitized:
    return Sanitized(FOLDER / "address")


def test_planted_faults_are_reported(sanitized: Sanitized) -> None:
    """A read or write of one element past the end of each argument of each operator; a misaligned one."""
    status, text = sanitized.run(SETS[0], "-m", "tests.sanitize.planted", lines=False)
    assert text.count(": reported") >= 30, text
    assert status == 0, text


@pytest.mark.parametrize("isa", SETS)
def test_random_calls(sanitized: Sanitized, isa: str) -> None:
    found = fuzz(sanitized, isa, seed=0, cases=CASES)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS)
def test_operator_tests(sanitized: Sanitized, isa: str) -> None:
    status, text = sanitized.run(isa, "-m", "pytest", "tests/operators", "-q", "-p", "no:cacheprovider")
    assert status == 0, text[-8000:]
    assert " passed" in text


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS)
def test_table_of_cases(sanitized: Sanitized, isa: str) -> None:
    status, text = sanitized.run(isa, "-m", "stella_kernels", "verify", "--quick")
    assert status == 0, text[-8000:]


def _threads(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"STELLA_KERNELS_ISA": isa, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(THREADS), *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS)
def test_threads(isa: str) -> None:
    done = _threads(isa)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert done.stdout.startswith(f"{isa} on 4 threads")
    assert done.stdout.count(" bytes alike") == 21


@pytest.mark.slow
def test_planted_race_is_reported() -> None:
    done = _threads(SETS[0], "--planted")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr

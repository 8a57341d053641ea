"""The package's environment variables: one table, any case of letters, and an error for what is not in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stella_kernels import environment
from stella_kernels.operators import backends
from stella_kernels.operators.native.build_info import build_info

ROOT = Path(__file__).parents[2]
NATIVE = build_info() if backends.serving("polar") == "cpu" else None


def imported(code: str = "import stella_kernels", **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(environment.PREFIX)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=inherited | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "name",
    [
        "STELLA_KERNELS_BAKCEND",
        "STELLA_KERNELS_THREADS",
        "stella_kernels_backend",
        "STELLA_KERNEL_BACKEND",
        "STELLAKERNELS_BACKEND",
    ],
)
def test_a_variable_that_there_is_not(name: str) -> None:
    done = imported(**{name: "cpu"})
    assert done.returncode != 0
    assert (
        f"ValueError: {name}: found set, but there is no such variable, wanted STELLA_KERNELS_BACKEND, " in done.stderr
    )
    assert ("did you mean STELLA_KERNELS_BACKEND?" in done.stderr) == ("THREADS" not in name)


@pytest.mark.parametrize("name", [name for name, variable in environment.VARIABLES.items() if variable.choices])
def test_a_value_that_is_no_choice(name: str) -> None:
    done = imported(**{name: "fastest"})
    assert done.returncode != 0
    for choice in environment.VARIABLES[name].choices:
        assert repr(choice) in done.stderr
    assert f"ValueError: {name}: found 'fastest', wanted one of " in done.stderr


@pytest.mark.parametrize(
    ("name", "found", "meant"),
    [("STELLA_KERNELS_ISA", "AVX-512", "avx512"), ("STELLA_KERNELS_BACKEND", "refrence", "reference")],
)
def test_a_value_that_is_nearly_a_choice(name: str, found: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, found)
    with pytest.raises(ValueError, match=f"found '{found}', wanted one of .*; did you mean '{meant}'\\? Else unset it"):
        environment.value(name)


def test_the_documented_table() -> None:
    """docs/api.md has a row for each variable, as the table has it; a row that is shown as wanted goes there."""
    rows = []
    for name, variable in environment.VARIABLES.items():
        values = [f"`{choice}`{' (default)' * (choice == variable.default)}" for choice in variable.choices]
        rows.append(f"| `{name}` | {', '.join(values) or 'any text'} | {variable.meaning} |")
    found = [line for line in (ROOT / "docs" / "api.md").read_text().splitlines() if line.startswith("| `STELLA_")]
    assert found == rows


def test_an_empty_variable_that_there_is_not_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STELLA_KERNELS_DEBUG", "")
    environment.check()
    monkeypatch.setenv("STELLA_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="there is no such variable"):
        environment.check()


@pytest.mark.parametrize("name", environment.VARIABLES)
def test_any_case_and_empty(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = environment.VARIABLES[name]
    for choice in variable.choices:
        for spelling in (choice, choice.upper(), choice.title()):
            monkeypatch.setenv(name, spelling)
            assert environment.value(name) == choice
    monkeypatch.setenv(name, "")
    assert environment.value(name) == variable.default
    monkeypatch.delenv(name)
    assert environment.value(name) == variable.default
    if not variable.choices:
        monkeypatch.setenv(name, "/Some/Folder")
        assert environment.value(name) == "/Some/Folder"


def test_a_backend_in_capitals_serves() -> None:
    code = "from stella_kernels.operators import backends; print(backends.requested(), backends.serving('polar'))"
    assert imported(code, STELLA_KERNELS_BACKEND="REFERENCE").stdout.split() == ["reference", "reference"]


@pytest.mark.skipif(NATIVE is None, reason="the native library does not serve here")
def test_instruction_sets() -> None:
    assert NATIVE is not None
    here, built = NATIVE.instruction_sets_here(), NATIVE.instruction_sets()
    assert here[-1] == "baseline"
    assert set(here) <= set(built) <= set(environment.VARIABLES["STELLA_KERNELS_ISA"].choices)
    code = "from stella_kernels.operators.native.build_info import build_info; print(build_info().instruction_set())"
    for name in environment.VARIABLES["STELLA_KERNELS_ISA"].choices:
        done = imported(code, STELLA_KERNELS_ISA=name.upper())
        if name in here:
            assert done.stdout.strip() == name, done.stderr
            assert not done.stderr
        else:
            assert done.returncode != 0
            assert f"STELLA_KERNELS_ISA: found '{name}', wanted one of {', '.join(map(repr, here))}" in done.stderr
            assert f"in this build: {', '.join(built)}" in done.stderr


@pytest.mark.skipif(NATIVE is None, reason="the native library does not serve here")
def test_an_instruction_set_asked_for_after_the_import() -> None:
    code = (
        "import os, torch, stella_kernels as sk; os.environ['STELLA_KERNELS_ISA'] = 'neon'\n"
        "try: sk.polar(torch.eye(3))\n"
        "except RuntimeError as error: print(error)"
    )
    assert "STELLA_KERNELS_ISA: found 'neon', wanted one of " in imported(code).stdout


def test_every_variable_that_is_read_is_in_the_table() -> None:
    """Whatever names a variable in the package or its build; CMake's own options are not of the environment."""
    sources = [*ROOT.glob("stella_kernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    found = {name for path in sources for name in re.findall(r"(?<!-D)\bSTELLA_KERNELS_[A-Z_]+", path.read_text())}
    assert found - {environment.PREFIX} <= set(environment.VARIABLES)
    assert found >= set(environment.VARIABLES)

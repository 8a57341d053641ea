"""The table of docs/install.md is what the log says; Pythons are found; what a wheel may ask of a system."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from release import check, pythons, table

ROOT = Path(__file__).parents[2]


def row(torch: str, python: str = "3.10.1", wheel: str = "s-py3-none-linux.whl", **more: str) -> dict[str, Any]:
    run = {"verify": "9 of 9 cases within tolerance, 3 s", "tests": "7 passed, 1 skipped in 2.00s"}
    return {"wheel": wheel, "python": python, "torch": torch, **(more or run)}


def test_the_documented_table() -> None:
    assert table.shown() == table.table(table.logged())


def test_a_table() -> None:
    rows = [
        row("2.14.1"), row("2.9.0"), row("2.14.1", "3.11.2", failed="verify: MISS"),
        row("2.9.0", "3.11.2", **{"not to be had": "no matching distribution"}),
        row("2.14.1", "3.12.3"), row("newest", "3.13.4", **{"not to be had": "no matching distribution"}),
        row("2.14.1", wheel="s-py3-none-any.whl"),
    ]  # fmt: skip
    said = table.table({"system": "Linux", "rows": rows}).splitlines()
    assert said[:6] == [
        "| Python | torch 2.9.0 | torch 2.14.1 |",
        "|---|---|---|",
        "| 3.10.1 | verify 9 of 9, 7 tests | verify 9 of 9, 7 tests |",
        "| 3.11.2 | not to be had | **failed** |",
        "| 3.12.3 | not run | verify 9 of 9, 7 tests |",
        "| 3.13.4 | not to be had | not to be had |",
    ]
    assert said[-1] == "`s-py3-none-any.whl`, on Python 3.10.1 and torch 2.14.1: verify 9 of 9, 7 tests."


def test_a_table_of_nothing_says_so() -> None:
    rows = [row("2.14.1", failed="pip install: no network"), row("2.9.0", wheel="s-py3-none-any.whl")]
    log = {"system": "Linux", "rows": rows}
    assert not table.served_somewhere(log)
    assert "`s-py3-none-linux.whl` **served nowhere**." in table.table(log)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("ERROR: No matching distribution found for torch==2.99.0", "not to be had"),
        ("[Errno 101] no network", "failed"),
    ],
)
def test_only_a_torch_that_no_index_has_is_not_to_be_had(
    said: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*command: str, **_: object) -> str:
        if "install" in command:
            raise check.Failed(f"-m pip install: {said}")
        return ""

    monkeypatch.setattr(check, "_said", refuse)
    (here,) = pythons.to_be_had([sys.executable])
    found = check._row(Path("s-py3-none-linux.whl"), here, "2.99.0", tmp_path)
    assert kept in found
    assert len({"failed", "not to be had"} & set(found)) == 1


def test_what_is_checked_holds_and_starts_at_the_oldest_torch() -> None:
    assert not [row for row in table.logged()["rows"] if "failed" in row]
    oldest = re.search(r'dependencies = \["torch>=(.*)"\]', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert f"{oldest[1]}.0" == check.OLDEST_TORCH


def test_this_python_is_to_be_had() -> None:
    (found,) = pythons.to_be_had([sys.executable])
    assert (found.minor, found.suffix) == (sys.version_info[1], sysconfig.get_config_var("EXT_SUFFIX"))
    assert found.suffix in {python.suffix for python in pythons.to_be_had()}


def test_a_python_that_does_not_run(tmp_path: Path) -> None:
    name = str(tmp_path / "python3.10")
    assert pythons.asked(name) is None
    with pytest.raises(ValueError, match=r"PYTHONS: found '.*python3.10', wanted a CPython 3.10 or newer"):
        pythons.to_be_had([name])


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("objdump") is None, reason="needs c++ and objdump")
def test_a_library_for_older_systems_asks_for_nothing_newer(tmp_path: Path) -> None:
    """Of the functions that got new versions, of the C++ library's templates, and of what headers ask for since."""
    source = tmp_path / "asks.cpp"
    source.write_text(
        "#include <cmath>\n#include <memory>\n#include <shared_mutex>\n#include <sstream>\n#include <vector>\n"
        "#include <dlfcn.h>\n"
        'extern "C" double ask(double x, double y) {\n'
        "  static std::shared_mutex mutex;\n  const std::shared_lock lock(mutex);\n"
        "  std::ostringstream text;\n  std::stringstream both;\n  both << x;\n"
        "  text << both.str() << std::make_shared<std::vector<double>>(3, x)->size();\n"
        "  double* const many = new double[static_cast<size_t>(x)];\n"
        "  const double sum = std::pow(x, y) + many[1] + text.str().size() + (dlsym(dlopen(nullptr, 1), "
        '"no") != nullptr);\n'
        "  delete[] many;\n  return sum;\n}\n"
    )
    library = tmp_path / "asks.so"
    older = [str(ROOT / "csrc" / "older_systems.cpp"), "-include", str(ROOT / "csrc" / "older_systems.h")]
    subprocess.run(
        ["c++", "-std=c++17", "-O3", "-shared", "-fPIC", str(source), *older,
         "-o", str(library)], check=True,
    )  # fmt: skip
    symbols = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}  # of manylinux_2_28
    asked = re.findall(r"\*UND\*.*\b(GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)? +(\S+)", symbols)
    assert {"pow", "dlsym"} <= {symbol for _, _, symbol in asked}
    assert not [
        (family, version, symbol)
        for family, version, symbol in asked
        if tuple(map(int, version.split("."))) > newest[family]
    ]
    assert "__libc_single_threaded" not in symbols

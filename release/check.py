"""Wheels installed into fresh environments, with nothing on the PATH: verify, the operators' tests, a first snippet."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .build import ROOT
from .pythons import Python

LOG = Path(__file__).parent / "log.json"
OLDEST_TORCH = "2.10.0"  # pyproject.toml's oldest
# What the tests need; the package itself needs torch alone.
_FOR_TESTS = ("numpy", "pytest", "expecttest", "hypothesis")
_TESTS = ("tests/operators",)
_FASTER = "not slow and not whole"


class Failed(Exception):
    """A step that did not end well, with the end of what it said."""


def check(dist: Path, work: Path, pythons: Sequence[Python], torches: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each pair of Python and torch ('newest', or a version), and one for the wheel without a library."""
    (native,) = dist.glob("*-py3-none-*linux*.whl")
    (pure,) = dist.glob("*-py3-none-any.whl")
    pairs = [(native, python, torch) for python in pythons for torch in torches]
    pairs.append((pure, pythons[-1], torches[-1]))
    rows = []
    for wheel, python, torch in pairs:
        row = _row(wheel, python, torch, work)
        print(json.dumps(row), flush=True)
        rows.append(row)
        write(rows)  # an interrupted run leaves what it has shown
    return rows


def write(rows: list[dict[str, Any]]) -> None:
    """The log: a row a line, so that a difference reads well."""
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    LOG.write_text(f'{{"system": {json.dumps(system)}, "rows": [\n{lines}\n]}}\n')


def _row(wheel: Path, python: Python, torch: str, work: Path) -> dict[str, Any]:
    folder = work / f"python{python.minor}-torch{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    row: dict[str, Any] = {"wheel": wheel.name, "python": python.version, "torch": torch}
    try:
        for key, value in _steps(wheel, python, torch, folder):
            row[key] = value
    except Failed as failure:
        row["failed"] = str(failure)
    shutil.rmtree(folder, ignore_errors=True)  # gigabytes, over all pairs
    return row


def _steps(wheel: Path, python: Python, torch: str, folder: Path) -> Iterator[tuple[str, object]]:
    _said(python.executable, "-m", "venv", str(folder))
    own = str(folder / "bin" / "python")
    pip = (own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    try:
        _said(*pip, "torch" if torch == "newest" else f"torch=={torch}", *_FOR_TESTS)
    except Failed as failure:
        if "No matching distribution found for torch" not in str(failure):
            raise  # the network, the disk, or another package: nothing is known of this pair
        yield "not to be had", str(failure).splitlines()[-1]
        return
    yield "torch", _said(own, "-c", "import torch; print(torch.__version__.split('+')[0])")
    # From here on as where there is no compiler; pip finds everything that the wheel asks for.
    bare = {"PATH": str(folder / "nothing"), "HOME": str(folder)}
    start = time.perf_counter()
    _said(*pip, "--no-index", str(wheel), environment=bare)
    yield "install seconds", round(time.perf_counter() - start, 1)
    elsewhere = folder / "elsewhere"
    shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", elsewhere)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[:1]
    start = time.perf_counter()
    _said(own, "-c", snippet, environment=bare, cwd=elsewhere)
    yield "snippet seconds", round(time.perf_counter() - start, 1)
    facts = json.loads(_said(own, "-m", "stella_kernels", "info", "--json", environment=bare, cwd=elsewhere))
    build = facts["native build"] or {"instruction set chosen": "none"}
    yield "serves", facts["operators"]["cpu"]["polar"]["backend"]
    yield "instruction set", build["instruction set chosen"]
    launcher = "from stella_kernels.operators import planned; print(planned.launcher() is not None)"
    yield "launcher", _said(own, "-c", launcher, environment=bare, cwd=elsewhere) == "True"
    if facts["operators"]["cpu"]["polar"]["backend"] != "cpu" and "none-any" not in wheel.name:
        raise Failed(facts["backends"]["cpu"])
    verified = _said(own, "-m", "stella_kernels", "verify", "--quick", environment=bare, cwd=elsewhere)
    yield "verify", verified.splitlines()[-1]
    tested = (own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", _FASTER, *_TESTS)
    yield "tests", _said(*tested, environment=bare, cwd=elsewhere).splitlines()[-1]


def _said(*command: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What it printed, without the white space around it."""
    ours = ("PYTHON", "STELLA_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command, env=inherited | (environment or {}), cwd=cwd, capture_output=True, text=True, timeout=3600, check=False
    )
    if done.returncode:
        raise Failed(f"{' '.join(command[1:4])}: " + "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:]))
    return done.stdout.strip()

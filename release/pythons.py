"""The Pythons that are to be had on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST = (3, 10)  # pyproject.toml's requires-python
_NEWEST_MINOR = 16  # names that are looked for

_ASK = """
import json, platform, sys, sysconfig
header = sysconfig.get_path("include") + "/Python.h"
suffix, implementation = sysconfig.get_config_var("EXT_SUFFIX"), platform.python_implementation()
print(json.dumps([sys.executable, sys.version_info[:2], platform.python_version(), suffix, implementation, header]))
"""


@dataclass(frozen=True)
class Python:
    """An interpreter; ``suffix`` tells binary interfaces apart, ``has_headers`` whether one can be compiled for it."""

    executable: str
    minor: int
    version: str
    suffix: str
    has_headers: bool


def asked(executable: str) -> Python | None:
    """What it says of itself; None where it does not run or is too old."""
    try:
        done = subprocess.run([executable, "-c", _ASK], capture_output=True, text=True, timeout=60, check=True)
        path, version, full, suffix, implementation, header = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # a name that a version manager keeps for a Python that is not active, for example
    if implementation != "CPython" or tuple(version) < OLDEST:
        return None
    return Python(path, version[1], full, suffix, Path(header).exists())


def _names() -> Iterator[str]:
    yield sys.executable
    for minor in range(OLDEST[1], _NEWEST_MINOR):
        for name in (f"python3.{minor}", f"python3.{minor}t"):
            yield from filter(None, (shutil.which(name, path=folder) for folder in os.get_exec_path()))
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip()
        yield from map(str, sorted(Path(root).glob("versions/*/bin/python3")))


def to_be_had(named: Sequence[str] = ()) -> list[Python]:
    """Those named, else one of each version from this one, the PATH and pyenv, oldest first.

    Raises ``ValueError`` for one that is named and is no CPython from 3.10 on.
    """
    found: dict[str, Python] = {}
    for name in named or _names():
        python = asked(name)
        if python is None and named:
            raise ValueError(f"PYTHONS: found {name!r}, wanted a CPython 3.10 or newer that runs; leave it out.")
        if python is not None:
            found.setdefault(python.suffix, python)
    return sorted(found.values(), key=lambda python: (python.minor, python.suffix))

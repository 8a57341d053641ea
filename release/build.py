"""The sdist, and of it the wheels: one with the CPU library for every Python and every supported torch, one without."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .pythons import Python

ROOT = Path(__file__).parents[1]
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
# What torch brings; the wheel is loaded beside it and holds no copy.
_OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


def build(dist: Path, work: Path, pythons: Sequence[Python]) -> list[Path]:
    """Everything into ``dist``, which is emptied; what it holds then. Launchers are built for each of the Pythons."""
    for folder in (dist, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(dist)], cwd=ROOT, check=True)
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    (source,) = (path for path in work.iterdir() if path.is_dir())
    _wheel(source, dist, STELLA_KERNELS_BUILD="none")
    executables = ";".join(python.executable for python in pythons if python.has_headers)
    options = {"STELLA_KERNELS_PYTHONS": executables}
    if platform.system() == "Linux":
        options["STELLA_KERNELS_OLDER_SYSTEMS"] = "ON"
    arguments = shlex.join(f"-D{name}={value}" for name, value in options.items())
    native = _wheel(source, work, STELLA_KERNELS_BUILD="cpu", CMAKE_ARGS=arguments)
    if platform.system() == "Linux":
        excluded = [f"--exclude={name}" for name in _OF_TORCH]
        tag = f"manylinux_2_28_{platform.machine()}"
        subprocess.run(
            [sys.executable, "-m", "auditwheel", "repair", f"--plat={tag}", "--only-plat", *excluded,
             f"--wheel-dir={dist}", str(native)], check=True,
        )  # fmt: skip
    else:
        shutil.copy(native, dist)
    return sorted(dist.iterdir())


def _wheel(source: Path, folder: Path, **environment: str) -> Path:
    """The wheel that pip makes of it, with the packages of this environment."""
    known = set(folder.glob("*.whl"))
    subprocess.run(
        [*_PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(source)],
        env=os.environ | environment, check=True,
    )  # fmt: skip
    (made,) = set(folder.glob("*.whl")) - known
    return made

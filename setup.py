"""Hands the build of csrc/ to CMakeLists.txt; everything else is in pyproject.toml.

``STELLA_KERNELS_BUILD`` chooses what is built: ``auto`` (default: what can be built, saying loudly what was skipped),
``none`` (pure Python), ``cpu`` (fails when it cannot be built). ``CMAKE_ARGS`` are more options for CMake.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def environment() -> ModuleType:
    """The table of variables, by its file: importing the package would ask for torch."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "stella_kernels" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ENVIRONMENT = environment()
try:
    ENVIRONMENT.check()
    MODE = ENVIRONMENT.value("STELLA_KERNELS_BUILD")
except ValueError as error:
    sys.exit(f"stella_kernels: {error}")
LIBRARIES = ("_cpu.so", "_build_info.so")  # and a launcher of GPU kernels for each Python
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has parallel_for


def torch_here() -> tuple[Path, str]:
    """The folder of the torch that is installed and its version, without the seconds of importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return folder, str(runpy.run_path(str(folder / "version.py"))["__version__"])


def missing_for_cpu() -> list[str]:
    """What the CPU library needs beside torch and does not find, each with what to do."""
    missing = []
    _, version = torch_here()
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        missing.append(f"torch {version} is older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}; upgrade torch.")
    try:
        import pybind11  # noqa: F401
    except ImportError:
        missing.append("pybind11 is not installed: pip install pybind11")
    if shutil.which("cmake") is None:
        missing.append("cmake is not on the PATH: pip install cmake")
    if shutil.which("ninja") is None:
        missing.append("ninja is not on the PATH: pip install ninja")
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++") if c):
        missing.append("no C++ compiler was found: install g++ or clang++, or set CXX.")
    return missing


class CMakeBuild(build_ext):
    """Builds the CPU library, and puts it where the package looks for it."""

    def run(self) -> None:
        missing = missing_for_cpu()
        if missing and MODE == "cpu":
            sys.exit("stella_kernels: STELLA_KERNELS_BUILD=cpu cannot be done:\n  - " + "\n  - ".join(missing))
        if missing:
            report_skipped("the CPU library", missing)
            self.clear()
            return
        try:
            self.build()
        except (subprocess.CalledProcessError, OSError) as error:
            if MODE == "cpu":
                sys.exit(
                    f"stella_kernels: STELLA_KERNELS_BUILD=cpu failed: {error}. The compiler's messages are above."
                )
            report_skipped("the CPU library", [f"its build failed: {error}. The compiler's messages are above."])
            self.clear()

    def destination(self) -> Path:
        """Where the libraries belong: in the source tree, or in the folder that a wheel is packed from."""
        return ROOT / "stella_kernels" if self.inplace else Path(self.build_lib).resolve() / "stella_kernels"

    def clear(self, kept: Collection[str] = ()) -> None:
        """Take libraries of an earlier build away, from the source tree too: none serve, or all of this build."""
        for path in self.destination().glob("*.so"):
            if path.name not in kept:
                path.unlink()

    def build(self) -> None:
        import pybind11

        torch, version = torch_here()
        folder = Path(self.build_temp).resolve()
        libraries = folder / "libraries"
        shutil.rmtree(libraries, ignore_errors=True)  # of another Python, or of sources that are gone
        libraries.mkdir(parents=True)
        (folder / "CMakeCache.txt").unlink(missing_ok=True)  # CMAKE_ARGS of an earlier build are none of this one
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSTELLA_KERNELS_TORCH={torch}",
            f"-DSTELLA_KERNELS_TORCH_VERSION={version}",
            f"-DSTELLA_KERNELS_OUTPUT={libraries}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder)], check=True)
        made = {library.name for library in libraries.iterdir()}
        if absent := [name for name in LIBRARIES if name not in made]:
            raise FileNotFoundError(f"CMake ended well and left no {' and no '.join(absent)} in {libraries}")
        # Only now that everything is there: half of the libraries would be half a package.
        self.destination().mkdir(parents=True, exist_ok=True)
        for library in libraries.iterdir():
            # a new file beside the old one takes its name: a process that has the old one loaded keeps it
            fresh = self.destination() / f"{library.name}.new"
            shutil.copy2(library, fresh)
            fresh.replace(self.destination() / library.name)
        self.clear(kept=made)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "stella_kernels"
        return [str(path) for path in package.glob("*.so")]


class BinaryDistribution(Distribution):
    """A wheel with libraries in it is tagged for its platform."""

    def has_ext_modules(self) -> bool:
        return MODE != "none"


class AnyPython(bdist_wheel):
    """One wheel for every Python: the libraries are C, and of the launchers each Python finds its own or none."""

    def get_tag(self) -> tuple[str, str, str]:
        has_libraries = any(Path(self.bdist_dir).rglob("*.so"))  # auto skips what it cannot build
        return "py3", "none", super().get_tag()[2] if has_libraries else "any"


def report_skipped(what: str, reasons: list[str]) -> None:
    lines = [f"stella_kernels: {what} is NOT built; the pure-PyTorch reference will serve instead.", *reasons]
    bar = "!" * 80
    print("\n".join([bar, *lines, bar]), file=sys.stderr, flush=True)


# A wheel without torch stops at its metadata, an isolated build's first step; an sdist needs nothing compiled.
BUILDS = {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}
if MODE != "none" and BUILDS.intersection(sys.argv) and importlib.util.find_spec("torch") is None:
    sys.exit(
        "stella_kernels: torch is not installed in the environment of this build. Install torch first and build beside "
        "it: pip install --no-build-isolation . (or STELLA_KERNELS_BUILD=none pip install . for pure Python)."
    )

setup(
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython},
    distclass=BinaryDistribution,
    ext_modules=[] if MODE == "none" else [Extension("stella_kernels._cpu", sources=[])],
)

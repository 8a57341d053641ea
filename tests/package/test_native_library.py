"""Why the native library does not serve: every case by a library made for it, what is said and what is advised."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stella_kernels import environment, machine
from stella_kernels.operators import backends
from stella_kernels.operators.native import library
from stella_kernels.operators.native.build_info import build_info

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stella_kernels"
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++ on the PATH")
needs_native = pytest.mark.skipif(backends.serving("polar") != "cpu", reason="the native library does not serve here")


def info(folder: Path, cwd: Path, **variables: str) -> str:
    """What ``info`` prints of the package in that folder or archive, from elsewhere."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(environment.PREFIX)}
    done = subprocess.run(
        [sys.executable, "-m", "stella_kernels", "info"],
        cwd=cwd, env=inherited | {"PYTHONPATH": str(folder)} | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(folder: Path, *libraries: str) -> Path:
    """A copy of the package with those libraries alone."""
    shutil.copytree(PACKAGE, folder / "stella_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in libraries:
        shutil.copy(PACKAGE / name, folder / "stella_kernels")
    return folder


def compiled(library: Path, source: str) -> None:
    """A library of that source, which may ask for symbols that there are not."""
    file = library.with_suffix(".cpp")
    file.write_text(source)
    subprocess.run(["c++", "-shared", "-fPIC", "-Wl,-z,now", str(file), "-o", str(library)], check=True)
    file.unlink()


def test_where_nothing_was_built(tmp_path: Path) -> None:
    said = info(copied(tmp_path / "site"), tmp_path)
    assert f"{'native library':<16}not built\n" in said
    assert "not available: the native library was not built; install a wheel for this system" in said
    last = said.splitlines()[-1]
    assert last.startswith("next: install a wheel for this system and processor; or install a C++ compiler")
    assert "for the native library is not built" in last


def test_from_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "stella.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in copied(tmp_path / "site").rglob("*.py"):
            made.write(path, path.relative_to(tmp_path / "site"))
    said = info(archive, tmp_path)
    assert f"{'native library':<16}in an archive\n" in said
    assert f"the package is imported from the archive {archive}" in said
    assert said.splitlines()[-1].startswith("next: install it into a folder: pip install")


@needs_native
def test_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library with the processor of another in its header."""
    image = bytearray(library.LIBRARY.read_bytes())
    if image[:4] != b"\x7fELF":
        pytest.skip("not of ELF")
    here, other = (("x86_64", 183), ("aarch64", 62))[image[18] == 183]
    image[18:20] = other.to_bytes(2, "little")
    (tmp_path / "_cpu.so").write_bytes(image)
    found = library.load(tmp_path / "_cpu.so")
    assert found.state == "for another processor"
    assert found.why_not == f"the native library is for {library._PROCESSORS[other]}, and this Python runs on {here}"
    assert found.what_to_do.startswith(f"install the wheel for {here}")
    monkeypatch.setattr(library, "_PROCESSORS", {})
    assert library.load(tmp_path / "_cpu.so").state == "does not load"  # the linker says why


@needs_compiler
@pytest.mark.parametrize(
    ("symbol", "said"),
    [
        ("aoti_torch_of_another_release", "this torch has no symbol aoti_torch_of_another_release"),
        ("stella_nowhere", "no library here has the symbol stella_nowhere"),
    ],
)
def test_a_symbol_that_is_not_there(tmp_path: Path, symbol: str, said: str) -> None:
    compiled(tmp_path / "_cpu.so", f'extern "C" int {symbol}();\nextern "C" int ask() {{ return {symbol}(); }}\n')
    found = library.load(tmp_path / "_cpu.so")
    assert found.state == "does not load"
    assert found.why_not.endswith(f" does not load beside torch {torch.__version__}: {said}")
    native = build_info()
    if native is not None:
        assert f"built beside torch {native.torch_at_build} by {native.compiler}" in found.why_not
    assert "use torch 2.10 or newer; if it is, build beside it: STELLA_KERNELS_BUILD=cpu pip" in found.what_to_do


@pytest.mark.parametrize(
    ("message", "said", "advised"),
    [
        (
            "libm.so.6: version `GLIBC_2.38' not found (required by _cpu.so)",
            "it was built on a newer system, and asks for GLIBC_2.38 of a system library",
            "install the manylinux wheel",
        ),
        ("libtorch_cpu.so: cannot open shared object file", "libtorch_cpu.so: cannot open", "reinstall torch"),
    ],
)
def test_what_else_the_linker_says(message: str, said: str, advised: str) -> None:
    found = library._unloadable(message, None)
    assert found.state == "does not load"
    assert said in found.why_not
    assert found.what_to_do.startswith(advised)


class OfAnotherProcessor:
    compiler, torch_at_build = "GCC 12", "2.13.0"

    def instruction_sets(self) -> list[str]:
        return ["avx512", "baseline"]

    def instruction_set(self) -> str:
        raise ValueError("STELLA_KERNELS_ISA: found 'avx512', wanted 'baseline'")


def test_info_of_an_instruction_set_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    # as where the reference is asked for too, so that nothing native was loaded
    monkeypatch.setattr(machine, "build_info", OfAnotherProcessor)
    monkeypatch.setattr(machine, "next_step", lambda: "")
    build = machine.describe()["native build"]
    assert isinstance(build, dict)
    assert build["instruction set chosen"].startswith("none: STELLA_KERNELS_ISA: found 'avx512'")


def test_info_beside_a_folder_by_the_name_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert machine._triton().startswith("not available: module 'triton' has no attribute")


@needs_native
def test_next_step_where_kernels_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = build_info()
    assert native is not None
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if native.instruction_set() == native.instruction_sets_here()[0] and not torch.cuda.is_available():
        assert machine.next_step() == "nothing: native kernels serve on the CPU"
    libraries = ("_cpu.so", "_build_info.so")
    asked = info(copied(tmp_path / "site", *libraries), tmp_path, STELLA_KERNELS_BACKEND="Reference")
    assert f"{'native library':<16}not asked for\n" in asked
    assert asked.splitlines()[-1].startswith("next: unset STELLA_KERNELS_BACKEND: the reference serves the CPU")
    if len(here := native.instruction_sets_here()) > 1:
        slower = info(tmp_path / "site", tmp_path, STELLA_KERNELS_ISA="BASELINE")
        assert f"next: unset STELLA_KERNELS_ISA: this processor has {here[0]}, and baseline serves" in slower


def test_next_step_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cure is named after the CPU's, whatever serves there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "triton_why_not", lambda: "Triton is not installed; pip install triton")
    assert "for the GPU: Triton is not installed; pip install triton" in machine.next_step()
    monkeypatch.setattr(backends, "triton_why_not", lambda: "")
    monkeypatch.setenv("STELLA_KERNELS_AUTOTUNE", "0")
    assert "unset STELLA_KERNELS_AUTOTUNE: no tile of the adapter's GPU kernels is measured" in machine.next_step()
    monkeypatch.delenv("STELLA_KERNELS_AUTOTUNE")
    monkeypatch.setattr(machine.planned, "launcher", lambda: None)
    if torch.version.hip is None:
        assert "build the launcher of GPU kernels for this Python" in machine.next_step()


def test_next_step_of_idle_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "unset OMP_NUM_THREADS: 1 of 8 processors work" in machine.next_step()

"""The package from its sdist, outside the source tree; what each build mode does, and what it says when it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from stella_kernels.operators import backends

ROOT = Path(__file__).parents[2]
TOOLS = ("cmake", "ninja", "c++")
needs_compiler = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason=f"needs {', '.join(TOOLS)} on the PATH"
)
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in the source tree")

# What the project's own settings and the run of these tests must not lend to a build.
OWN = ("PYTHONPATH", "PIP_", "STELLA_KERNELS_", "CXX", "CMAKE_")


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    return subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=500, check=False
    )


def succeed(*command: str, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def sources() -> list[str]:
    """What a checkout holds: tracked files, without a repository every file that is not a product."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode == 0:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    paths = (path.relative_to(ROOT) for top in ("stella_kernels", "csrc", "tests") for path in (ROOT / top).rglob("*"))
    kept = [str(path) for path in paths if path.suffix in (".py", ".h", ".cpp", ".typed")]
    return [*kept, "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked sdist, made from a clean copy of the checkout."""
    work = tmp_path_factory.mktemp("sdist")
    for name in sources():
        (work / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, work / "copy" / name)
    succeed(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(work / "dist"), cwd=work / "copy")
    (archive,) = (work / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work / "out", filter="data")
    (folder,) = (work / "out").iterdir()
    return folder


def wheel(folder: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
    ]
    return run(*pip, "--no-index", "--wheel-dir", str(out), str(folder), cwd=out, **environment)


def installed(folder: Path, out: Path, mode: str) -> tuple[Path, Path]:
    """The wheel that the mode builds, and the folder that it is installed to."""
    out.mkdir(exist_ok=True)
    built = wheel(folder, out, STELLA_KERNELS_BUILD=mode)
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = out.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    succeed(*pip, "--target", str(out / "site"), str(archive), cwd=out)
    return archive, out / "site"


@pytest.mark.slow
def test_sdist_holds_every_file_that_a_build_needs(unpacked: Path) -> None:
    needed = [n for n in sources() if n.startswith(("stella_kernels/", "csrc/", "tests/")) or "/" not in n]
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    development = {".gitignore", ".clang-format", "Makefile", "mkdocs.yml", "requirements-dev.txt"}
    assert {n for n in needed if not n.startswith(".")} - development <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


@pytest.mark.whole
@needs_compiler
def test_wheel_built_from_the_sdist_runs_outside_the_source_tree(unpacked: Path, tmp_path: Path) -> None:
    archive, site = installed(unpacked, tmp_path / "cpu", "cpu")
    names = set(zipfile.ZipFile(archive).namelist())
    launcher = f"stella_kernels/_launcher{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert {"stella_kernels/_cpu.so", "stella_kernels/_build_info.so", launcher, "stella_kernels/py.typed"} <= names
    assert {n for n in sources() if n.startswith("stella_kernels/") and n.endswith(".py")} <= names
    assert "-py3-none-" in archive.name  # for every Python
    assert not archive.name.endswith("none-any.whl")
    where = succeed(
        sys.executable,
        "-c",
        "import stella_kernels; print(stella_kernels.__file__)",
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert where.strip().startswith(str(site))
    # STELLA_KERNELS_BACKEND=cpu is an error where the native library does not serve
    text = succeed(
        sys.executable, "-m", "stella_kernels", "verify", "--quick",
        cwd=tmp_path, PYTHONPATH=str(site), STELLA_KERNELS_BACKEND="cpu",
    )  # fmt: skip
    assert "\ncpu       polar" in text


@pytest.mark.slow
def test_mode_none_is_pure_python(unpacked: Path, tmp_path: Path) -> None:
    archive, site = installed(unpacked, tmp_path / "none", "none")
    assert archive.name.endswith("py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(archive).namelist() if name.endswith(".so")]
    command = [sys.executable, "-m", "stella_kernels"]
    text = succeed(*command, "verify", "--quick", cwd=tmp_path, PYTHONPATH=str(site))
    assert "backend 'cpu' was not run: the native library was not built" in text
    assert "native library was not built" in succeed(*command, "info", cwd=tmp_path, PYTHONPATH=str(site))
    asked = run(*command, "info", cwd=tmp_path, PYTHONPATH=str(site), STELLA_KERNELS_BACKEND="cpu")
    assert asked.returncode != 0
    assert "STELLA_KERNELS_BACKEND=cpu: the native library was not built" in asked.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cpu", "auto"])
def test_without_a_compiler(unpacked: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "bin").mkdir()
    environment = {"PATH": str(tmp_path / "bin"), "STELLA_KERNELS_BUILD": mode}
    built = wheel(unpacked, tmp_path, **environment)
    text = built.stdout + built.stderr
    for what in ("cmake is not on the PATH", "ninja is not on the PATH", "no C++ compiler was found"):
        assert what in text
    if mode == "cpu":
        assert built.returncode != 0
        assert "STELLA_KERNELS_BUILD=cpu cannot be done" in text
    else:
        assert built.returncode == 0, text
        assert "the CPU library is NOT built; the pure-PyTorch reference will serve instead" in text
        (archive,) = tmp_path.glob("*.whl")
        assert archive.name.endswith("-py3-none-any.whl")


# A cmake that makes the libraries named in MADE and then says that it failed, or did not.
CMAKE = """#!{python}
import os, pathlib, sys
arguments = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("-D"))
note = pathlib.Path({note!r})
if arguments:
    note.write_text(arguments["STELLA_KERNELS_OUTPUT"])
else:
    for name in os.environ["MADE"].split():
        (pathlib.Path(note.read_text()) / name).write_text("library")
    sys.exit(int(os.environ["FAILS"]))
"""


def pretended_build(
    folder: Path, mode: str, made: str, fails: bool, root: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """The build step alone, with that cmake, and with whatever else it looks for on the PATH; in place of a copy."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "cmake").write_text(CMAKE.format(python=sys.executable, note=str(folder / "note")))
    for name in ("ninja", "c++"):
        (tools / name).write_text("")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    where = ["--build-lib", str(folder / "lib")] if root == ROOT else ["--inplace"]
    return run(
        sys.executable, "setup.py", "-q", "build_ext", *where, "--build-temp", str(folder / "temp"), cwd=root,
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", STELLA_KERNELS_BUILD=mode, MADE=made, FAILS=str(int(fails)),
    )  # fmt: skip


ALL = "_cpu.so _build_info.so _launcher.so"


@pytest.mark.parametrize(("mode", "in_place"), [("auto", False), ("Auto", True), ("cpu", False), ("CPU", True)])
def test_a_build_that_fails_leaves_no_library(tmp_path: Path, mode: str, in_place: bool) -> None:
    """Not the half of them that was made; nor those of an earlier build where the reference is said to serve."""
    pytest.importorskip("pybind11")
    root, package = ROOT, tmp_path / "lib" / "stella_kernels"
    if in_place:
        root, package = tmp_path / "copy", tmp_path / "copy" / "stella_kernels"
        package.mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "stella_kernels/environment.py"):
            shutil.copy(ROOT / name, root / name)
        (package / "version.py").write_text('__version__ = "1"\n')
        (package / "_build_info.cpython-310.so").write_text("of an earlier release")
    every = sorted(ALL.split())
    assert pretended_build(tmp_path, mode, ALL, fails=False, root=root).returncode == 0
    assert sorted(path.name for path in package.glob("*.so*")) == every
    for made, fails, why in ((ALL, True, "failed"), ("_cpu.so", False, "left no _build_info.so")):
        done = pretended_build(tmp_path, mode, made, fails, root)
        assert why in done.stderr
        if mode.lower() == "auto":
            assert done.returncode == 0
            assert "the CPU library is NOT built" in done.stderr
            assert not list(package.glob("*.so*"))
        else:
            assert done.returncode != 0
            assert "STELLA_KERNELS_BUILD=cpu failed" in done.stderr
            assert sorted(path.name for path in package.glob("*.so*")) == every  # nothing is packed from there
    assert pretended_build(tmp_path, mode, ALL, fails=False, root=root).returncode == 0
    assert sorted(path.name for path in package.glob("*.so*")) == every


@pytest.mark.whole
@needs_compiler
def test_a_path_with_spaces_and_parentheses(unpacked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a (b) c" / "source"
    shutil.copytree(unpacked, folder, ignore=shutil.ignore_patterns("build"))  # of a test that built there
    _, site = installed(folder, tmp_path / "out (d)", "cpu")
    code = (
        "from stella_kernels.operators import backends, planned\n"
        "from stella_kernels.operators.native.build_info import build_info\n"
        "print(backends.serving('polar'), build_info().instruction_sets_here()[-1], bool(planned.launcher()))"
    )
    told = succeed(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert told.split() == ["cpu", "baseline", "True"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BUILD", "fast", "STELLA_KERNELS_BUILD: found 'fast', wanted one of 'auto', 'none', 'cpu'; correct it"),
        ("BIULD", "cpu", "STELLA_KERNELS_BIULD: found set, but there is no such variable"),
        ("ISA", "avx5", "STELLA_KERNELS_ISA: found 'avx5', wanted one of 'avx512', "),
    ],
)
def test_a_variable_that_cannot_be(unpacked: Path, tmp_path: Path, variable: str, value: str, message: str) -> None:
    built = wheel(unpacked, tmp_path, **{f"STELLA_KERNELS_{variable}": value})
    assert built.returncode != 0
    assert message in built.stdout + built.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "cpu", "none"])
def test_a_build_that_finds_no_torch(unpacked: Path, tmp_path: Path, mode: str) -> None:
    """The metadata hook with setuptools alone importable, as in an isolated environment."""
    import setuptools

    site, packages = tmp_path / "site", Path(setuptools.__file__).parent.parent
    site.mkdir()
    for path in (packages / "setuptools", packages / "_distutils_hack", *packages.glob("setuptools-*.dist-info")):
        (site / path.name).symlink_to(path)
    hook = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('metadata'))"
    folder = tmp_path / "source"
    shutil.copytree(unpacked, folder, ignore=shutil.ignore_patterns("build"))
    (folder / "metadata").mkdir()
    done = run(sys.executable, "-S", "-c", hook, cwd=folder, PYTHONPATH=str(site), STELLA_KERNELS_BUILD=mode)
    if mode == "none":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "torch is not installed in the environment of this build" in done.stderr
        assert "pip install --no-build-isolation ." in done.stderr


def test_an_isolated_build_does_not_fetch_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = [line for line in text.splitlines() if line.startswith("requires = ")]
    assert "setuptools" in requires
    assert "torch" not in requires


@pytest.mark.skipif(backends.serving("polar") != "cpu", reason="the native library does not serve here")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_library_outlives_a_torch_release() -> None:
    """Only C symbols of torch: a mangled name of at:: or c10:: changes with releases."""
    symbols = succeed("nm", "-D", "--undefined-only", str(ROOT / "stella_kernels" / "_cpu.so"), cwd=ROOT).split()
    assert [name for name in symbols if "aoti_torch" in name]  # the stable ABI is what it uses
    unstable = ("N2at", "NK2at", "N3c10", "NK3c10", "N5torch", "NK5torch")
    assert not [name for name in symbols if any(part in name for part in unstable)]

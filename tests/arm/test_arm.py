"""The CPU kernels compiled for 64-bit ARM: the table of cases on an emulated processor. ``make test-arm`` runs it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stella_kernels.verification.case_table import Case, cases
from stella_kernels.verification.judge import check

pytest.importorskip("unicorn", reason="make test-arm brings the emulator and a compiler for other processors")
pytest.importorskip("ziglang")
if "STELLA_ARM_PROGRAM" not in os.environ:
    pytest.skip("STELLA_ARM_PROGRAM: wanted the program that make test-arm builds", allow_module_level=True)

from tests.arm.operators import Arm64

PROGRAM = Path(os.environ["STELLA_ARM_PROGRAM"])
CSRC = Path(__file__).parents[2] / "csrc" / "cpu"
SOURCES = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.cpp"))


@pytest.fixture(scope="module")
def emulated() -> dict[str, Callable[..., Any]]:
    return Arm64(PROGRAM).operators()


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
@pytest.mark.usefixtures("one_thread")
def test_table_of_cases(case: Case, emulated: dict[str, Callable[..., Any]]) -> None:
    result = check(case, "arm64", emulated)
    assert result.passed, f"{result.what}: error {result.error:.2e}, tolerance {result.tolerance:.2e}"


def test_refuses_what_is_not_finite(emulated: dict[str, Callable[..., Any]]) -> None:
    M = torch.randn(3, 40, 8)
    M[1, 20, 3] = torch.nan
    _, info = emulated["polar"](M, "auto")
    assert info[:, 0].tolist() == [0, 1, 0]


def test_products_are_of_vectors() -> None:
    """Fused multiply-adds of four float32 or two float64, by their encodings."""
    image = PROGRAM.read_bytes()
    words = struct.unpack(f"<{len(image) // 4}I", image[: len(image) // 4 * 4])
    vectors = sum(
        word & 0xFFA0FC00 == 0x4E20CC00 or word & 0xFF80F400 == 0x4F801000  # FMLA by vector, by element
        for word in words
    )
    assert vectors > 2000, vectors


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos", "x86_64-macos"])
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for(target: str, source: str, tmp_path: Path) -> None:
    """Operators and kernels, without linking."""
    import ziglang

    compiler = Path(ziglang.__file__).parent / "zig"
    definitions = ["-DSTELLA_ISA=baseline", "-DSTELLA_VECTOR_BYTES=16", "-DTORCH_TARGET_VERSION=0x020A000000000000"]
    definitions += ['-DSTELLA_COMPILER="clang"', '-DSTELLA_TORCH_VERSION="none"']
    generator, signatures = CSRC / "torch" / "generate_signatures.py", tmp_path / "signatures.h"
    defined = CSRC.parents[1] / "stella_kernels" / "operators" / "signatures.py"
    subprocess.run([sys.executable, str(generator), str(defined), str(signatures)], check=True)
    includes = [f"-I{CSRC}", f"-I{tmp_path}", "-isystem", str(Path(torch.__file__).parent / "include")]
    warnings = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    command = [str(compiler), "c++", "-target", target, "-std=c++17", "-c", *warnings, *definitions]
    done = subprocess.run(
        [*command, *includes, str(CSRC / source), "-o", str(tmp_path / "object")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]

"""Whether the native CPU library serves here, and if not, which of the reasons it is and what to do."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import environment
from .build_info import BuildInfo, build_info

LIBRARY = Path(__file__).parents[2] / "_cpu.so"

# Of ELF's processors those that people have, by the numbers in the file's header, and as ``platform.machine`` says it.
_PROCESSORS = {3: "i686", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Standing:
    """Which case it is, why the library does not serve in that case, and what to do about it."""

    state: str  # serves, not asked for, not built, in an archive, for another processor, does not load
    why_not: str = ""
    what_to_do: str = ""


def load(library: Path = LIBRARY) -> Standing:
    """Load the library unless ``STELLA_KERNELS_BACKEND`` asks for the reference; how that went.

    Raises ``ValueError`` where ``STELLA_KERNELS_ISA`` asks for kernels that are not built or cannot run here.
    """
    if environment.value("STELLA_KERNELS_BACKEND") == "reference":
        return Standing(
            "not asked for", "STELLA_KERNELS_BACKEND=reference asks for the reference", "unset STELLA_KERNELS_BACKEND"
        )
    if (absent := _absent(library)) is not None:
        return absent
    if (foreign := _foreign(library)) is not None:
        return foreign
    native = build_info()
    _check_instruction_set(native)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return _unloadable(str(error.__cause__ or error), native)  # torch says which file, its cause why
    return Standing("serves")


def _absent(library: Path) -> Standing | None:
    archive = next((path for path in library.parents if path.is_file()), None)
    if archive is not None:
        return Standing(
            "in an archive",
            f"the package is imported from the archive {archive}, where no native library can be loaded from",
            "install it into a folder: pip install, with the archive or its project",
        )
    if library.exists():
        return None
    return Standing(
        "not built",
        "the native library was not built",
        "install a wheel for this system and processor; or install a C++ compiler, cmake, ninja and pybind11, then run "
        "STELLA_KERNELS_BUILD=cpu pip install --no-build-isolation . in a checkout, which says what is missing",
    )


def _foreign(library: Path) -> Standing | None:
    with library.open("rb") as file:
        header = file.read(20)
    if header[:4] != b"\x7fELF":
        return None
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    found = _PROCESSORS.get(number, f"processor {number} of ELF")
    here = _MACHINES.get(platform.machine(), platform.machine())
    if found == here or here not in _PROCESSORS.values():
        return None
    return Standing(
        "for another processor",
        f"the native library is for {found}, and this Python runs on {here}",
        f"install the wheel for {here}, or build here: STELLA_KERNELS_BUILD=cpu pip install --no-build-isolation .",
    )


def _check_instruction_set(native: BuildInfo | None) -> None:
    wanted = environment.value("STELLA_KERNELS_ISA")
    if wanted and native is not None and wanted not in native.instruction_sets_here():
        raise ValueError(
            f"STELLA_KERNELS_ISA: found {wanted!r}, wanted {environment.one_of(native.instruction_sets_here())}, which "
            f"this processor has (in this build: {', '.join(native.instruction_sets())}); unset it for the best."
        )


def _unloadable(message: str, native: BuildInfo | None) -> Standing:
    """What the dynamic linker said, in words: which symbol, and of which torch."""
    built = f", built beside torch {native.torch_at_build} by {native.compiler}," if native else ""
    what = f"the native library{built} does not load beside torch {torch.__version__}"
    rebuild = "STELLA_KERNELS_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps ."
    if symbol := re.search(r"undefined symbol: (\w+)", message):
        why_not = f"{what}: no library here has the symbol {symbol[1]}"
        if re.match(r"aoti_|torch_|_ZN\w*(at|c10|torch)", symbol[1]):
            why_not = f"{what}: this torch has no symbol {symbol[1]}"
        return Standing("does not load", why_not, f"use torch 2.10 or newer; if it is, build beside it: {rebuild}")
    if version := re.search(r"version [`']((?:GLIBC|GLIBCXX|CXXABI)_[\w.]+)' not found", message):
        return Standing(
            "does not load",
            f"{what}: it was built on a newer system, and asks for {version[1]} of a system library",
            f"install the manylinux wheel, or build here: {rebuild}",
        )
    return Standing("does not load", f"{what}: {message}", f"reinstall torch, or build beside this one: {rebuild}")

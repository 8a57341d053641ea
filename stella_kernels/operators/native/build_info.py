"""How the native library was built and which instruction set serves here: the C functions of ``_build_info.so``.

They are read with ctypes, so that one file serves every Python; it needs no torch, so that it loads where the library
itself does not, and says what that was built with.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_FILE = Path(__file__).parents[2] / "_build_info.so"


class BuildInfo:
    """What the file says; raises ``OSError`` where it does not load."""

    def __init__(self, file: Path) -> None:
        self._functions = ctypes.CDLL(str(file))

    def _text(self, name: str, *arguments: object) -> str:
        function = getattr(self._functions, name)
        function.restype = ctypes.c_char_p
        return str(function(*arguments).decode())

    @property
    def compiler(self) -> str:
        """Its name and version."""
        return self._text("stella_compiler")

    @property
    def torch_at_build(self) -> str:
        """The version of the torch that the library was built beside."""
        return self._text("stella_torch_at_build")

    def instruction_sets(self) -> list[str]:
        """Those in this build, best first."""
        return self._text("stella_instruction_sets", 0).split(",")

    def instruction_sets_here(self) -> list[str]:
        """Those of them that run here."""
        return self._text("stella_instruction_sets", 1).split(",")

    def instruction_set(self) -> str:
        """The one that serves here."""
        return self._chosen()[0]

    def vector_bytes(self) -> int:
        """Bytes of a vector register of that set."""
        return self._chosen()[1]

    def _chosen(self) -> tuple[str, int]:
        vector_bytes = ctypes.c_int()
        text = self._text("stella_instruction_set", ctypes.byref(vector_bytes))
        if not vector_bytes.value:  # STELLA_KERNELS_ISA was changed since the import, which has checked it
            raise ValueError(text)
        return text, vector_bytes.value


@functools.cache
def build_info() -> BuildInfo | None:
    """What is known of the build, or None where nothing was built or it is another processor's."""
    try:
        return BuildInfo(_FILE)
    except OSError:
        return None

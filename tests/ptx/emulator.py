"""The emulator of compiled kernels: Triton's launches on CPU tensors, and launches of PTX as it is written."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tests.ptx import driver

T = TypeVar("T")

# As in csrc/emulator/block.h.
NOISE, TRUNCATE, RACES = 1, 2, 4
EVERYTHING = NOISE | TRUNCATE | RACES


@dataclass(frozen=True)
class Launch:
    """What a launch was and what it did. Bytes are of global memory, by every lane, whatever a cache would have."""

    function: int  # which of the kernels that are loaded
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    static_barriers: int  # in the kernel's code
    instructions: int  # issued by warps
    barriers: int  # of all blocks
    products: int  # matrix instructions, of warps
    bytes_read: int
    bytes_written: int


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("warps", ctypes.c_uint32),
        ("static_barriers", ctypes.c_int32),
        *((name, ctypes.c_uint64) for name in ("instructions", "barriers", "products", "bytes_read", "bytes_written")),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Loaded once for the process: Triton's kernels run in it, and torch's tensors are in memory that it knows.

    ``STELLA_PTX_ARCH`` is the architecture, 80 unless told.
    """
    # Images are PTX here, which no cache of a GPU's may meet.
    os.environ["TRITON_CACHE_DIR"] = str(Path(driver.libraries()).parent / "triton")
    os.environ["STELLA_KERNELS_AUTOTUNE"] = "0"
    loaded = driver.install(driver.EMULATOR, arch())
    loaded.ptx_launch.restype = ctypes.POINTER(_Record)
    loaded.ptx_launch.argtypes = [ctypes.c_uint64]
    loaded.ptx_launches.restype = ctypes.c_uint64
    loaded.ptx_error.restype = loaded.ptx_known.restype = ctypes.c_char_p
    loaded.ptx_load.restype = ctypes.c_void_p
    loaded.ptx_load.argtypes = [ctypes.c_char_p]
    loaded.ptx_run.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 3, ctypes.c_void_p]
    loaded.ptx_remove_barrier.argtypes = [ctypes.c_void_p, ctypes.c_int]
    loaded.ptx_set.argtypes = [ctypes.c_int, ctypes.c_uint64]
    loaded.ptx_know_tensors()
    loaded.ptx_set(EVERYTHING, 1)

    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode() + b"\0"
    return loaded


def arch() -> int:
    return int(os.environ.get("STELLA_PTX_ARCH", "80"))


def operators() -> dict[str, Callable[..., Any]]:
    """The operators of the Triton kernels, on CPU tensors: compiled, launched and emulated."""
    library()
    from stella_kernels.triton_kernels import registration

    return registration.operators()


def observed(call: Callable[[], T]) -> tuple[T, list[Launch]]:
    """What a call returns, and what it launches, in order, with what each launch issued and moved."""
    emulator = library()
    emulator.ptx_forget_launches()
    result = call()
    found = []
    for i in range(emulator.ptx_launches()):
        record = emulator.ptx_launch(i).contents
        values = {name: getattr(record, name) for name, _ in _Record._fields_}
        found.append(Launch(**values | {"kernel": record.kernel.decode(), "grid": tuple(record.grid)}))
    return result, found


@contextmanager
def without_barrier(function: int, which: int) -> Iterator[None]:
    """One of the barriers in a kernel's code is passed over."""
    library().ptx_remove_barrier(function, which)
    try:
        yield
    finally:
        library().ptx_remove_barrier(function, -1)


@contextmanager
def unkind(flags: int, seed: int = 1) -> Iterator[None]:
    """With other flags, and from a seed of the emulator's choices."""
    library().ptx_set(flags, seed)
    try:
        yield
    finally:
        library().ptx_set(EVERYTHING, 1)


class Kernel:
    """A kernel from its PTX's text: what Triton would have made of no program of ours."""

    def __init__(self, text: str) -> None:
        self.handle = library().ptx_load(text.encode())
        if not self.handle:
            raise RuntimeError(library().ptx_error().decode())

    def run(self, *arguments: Tensor | int, blocks: int = 1, threads: int = 32, shared: int = 0) -> None:
        """Launch; every parameter of the kernel is 64 bits, an address or a number."""
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        boxes = [ctypes.c_uint64(value) for value in values]
        parameters = (ctypes.c_void_p * max(1, len(boxes)))(*(ctypes.addressof(box) for box in boxes))
        if library().ptx_run(self.handle, blocks, threads, shared, parameters):
            raise RuntimeError(library().ptx_error().decode())


def known() -> list[str]:
    """Opcodes of the emulator's table of instructions."""
    return sorted(library().ptx_known().decode().split())


def kernel_of(body: str, parameters: int, registers: str = "", memory: str = "") -> Kernel:
    """A kernel around instructions. ``%a0`` and on are its parameters, ``%l`` is the thread."""
    names = [f"p{i}" for i in range(parameters)]
    loads = "".join(f"ld.param.b64 %a{i}, [{name}];\n" for i, name in enumerate(names))
    return Kernel(
        f".version 8.0\n.target sm_80\n.address_size 64\n{memory}\n.visible .entry kernel(\n"
        + ",\n".join(f".param .b64 {name}" for name in names)
        + f")\n{{\n.reg .b64 %a<{max(1, parameters)}>;\n.reg .b32 %l;\n{registers}\n"
        + f"mov.u32 %l, %tid.x;\n{loads}{body}\nret;\n}}\n"
    )

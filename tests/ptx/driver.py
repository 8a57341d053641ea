"""Triton's own CUDA driver class on a libcuda that is not NVIDIA's: all of the host's code runs, without a GPU.

``install(STUB)`` launches nothing, so that what remains is the host's time; ``install(EMULATOR)`` runs the launches.
Kernels then take tensors of the CPU. Both are for a process of their own.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

STUB, EMULATOR = "stub", "emulator"
MULTIPROCESSORS = 108  # an A100's, of which the grids of the adapter's kernels are made


def libraries() -> Path:
    """The folder with a folder for each of the two, which CMake makes with STELLA_KERNELS_PTX."""
    return Path(os.environ.get("STELLA_PTX_LIBRARIES", ".cache/ptx/build")).absolute()


def install(which: str, arch: int = 80) -> ctypes.CDLL:
    """From now on Triton compiles for ``arch``, a compute capability times ten, and launches on the library."""
    folder = libraries() / which
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)  # found by its name from now on

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_stream = int  # of device 0, as cheap as torch's
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: divmod(arch, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(Driver())
    properties = SimpleNamespace(name=which, major=arch // 10, minor=arch % 10, multi_processor_count=MULTIPROCESSORS)
    torch.cuda.get_device_properties = lambda device=None: properties
    return library

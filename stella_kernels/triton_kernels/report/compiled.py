"""Ahead-of-time compilation of a kernel for a chip that is not here, and what its machine code says of itself."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One kernel with the compile-time arguments of one use of it."""

    name: str
    kernel: triton.runtime.JITFunction[Any]
    constants: dict[str, Any]
    warps: int
    products: bool  # whether it multiplies tiles of factors or activations, so that tensor cores have work
    wide: bool  # whether it streams factors or activations, so that its loads should be wide
    pointers: dict[str, str]
    options: dict[str, int]
    divisible: tuple[str, ...] = ()  # integers that are multiples of 16, as pointers are

    def signature(self) -> dict[str, str]:
        """The types of all arguments, by Triton's names."""
        types = {}
        for name in self.kernel.arg_names:
            types[name] = "constexpr" if name in self.constants else self.pointers.get(name, "")
            assert types[name], f"{self.name}: no type for {name}"
        return types


@dataclass(frozen=True)
class Chip:
    """A target and its published limits per multiprocessor (CUDA C++ programming guide, technical specifications)."""

    name: str
    target: GPUTarget
    warps: int
    blocks: int
    shared: int  # bytes of a multiprocessor
    block_shared: int  # bytes of a block
    registers: int = 65536


def _nvidia(capability: int, warps: int, blocks: int, kilobytes: int, block_kilobytes: int) -> Chip:
    target = GPUTarget("cuda", capability, 32)
    return Chip(f"sm_{capability}", target, warps, blocks, kilobytes * 1024, block_kilobytes * 1024)


CHIPS = {
    chip.name: chip
    for chip in (
        _nvidia(80, 64, 32, 164, 163),
        _nvidia(89, 48, 24, 100, 99),
        _nvidia(90, 64, 32, 228, 227),
        _nvidia(100, 64, 32, 228, 227),
        _nvidia(120, 48, 24, 100, 99),
        # 64-wide wavefronts, 8 on each of 4 SIMDs, 64 KiB of LDS (AMD CDNA 3 instruction set guide)
        Chip("gfx942", GPUTarget("hip", "gfx942", 64), 32, 32, 65536, 65536, 512 * 4 * 64),
    )
}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one chip. ``spills`` counts instructions that store registers to local memory."""

    variant: Variant
    chip: Chip
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    tensor_core: int
    wide_loads: int
    wide_stores: int
    loads: int

    @property
    def occupancy(self) -> float:
        """Warps that fit a multiprocessor, of those it could hold."""
        if self.chip.target.backend == "hip":
            by_registers = 4 * (512 // max(8, -(-self.registers // 8) * 8)) // self.warps
        else:
            by_registers = self.chip.registers // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = self.chip.shared // (self.shared + 1024) if self.shared else self.chip.blocks
        blocks = min(self.chip.blocks, by_registers, by_shared, self.chip.warps // self.warps)
        return blocks * self.warps / self.chip.warps


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _nvidia_code(cubin: bytes) -> tuple[str, int, int]:
    """Disassembly, registers and stack bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(path)))
        assert usage is not None
        return _tool("nvdisasm", "-c", str(path)), int(usage[1]), int(usage[2])


def compile_for(variant: Variant, chip: Chip) -> Resources:
    """Compile; raises what Triton raises where its dialect cannot express the kernel for the chip."""
    signature = variant.signature()
    aligned = [
        i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in variant.divisible
    ]
    source = ASTSource(
        variant.kernel, signature, variant.constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    kernel = triton.compile(source, target=chip.target, options={"num_warps": variant.warps, **variant.options})
    shared = kernel.metadata.shared

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    if chip.target.backend == "hip":
        code = kernel.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", code)[-1])
        spills = int(re.findall(r"\.vgpr_spill_count:\s*(\d+)", code)[-1])
        stack = int(re.findall(r"\.private_segment_fixed_size:\s*(\d+)", code)[-1])
        tensor_core = count(r"v_mfma_\w+")
        wide = count(r"(?:global|buffer)_load_dwordx4"), count(r"(?:global|buffer)_store_dwordx4")
        loads = count(r"(?:global|buffer)_load_\w+")
    else:
        code, registers, stack = _nvidia_code(kernel.asm["cubin"])
        spills = count(r"\bSTL\b")
        tensor_core = count(r"\b(?:HMMA|HGMMA|DMMA|QMMA|UTC\w*MMA)\b")
        wide = count(r"\bLDG\S*\.128\b"), count(r"\bSTG\S*\.128\b")
        loads = count(r"\bLDG\b")
    return Resources(
        variant, chip, registers, spills, stack, shared, variant.warps, tensor_core, wide[0], wide[1], loads
    )

"""Launches that were made in the interpreter, as Triton's programs for a chip: it lets pass what is none.

It has no types that a loop must keep, no shapes that all returns of a function must share, and takes an integer that
is 1 for an integer, where a launch on a GPU makes a constant of it.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

POINTERS = {
    **{torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"},
    **{torch.int32: "*i32", torch.int64: "*i64"},
}
DTYPES = {str(d): d for d in (tl.float32, tl.float64, tl.bfloat16, tl.float16, tl.int32, tl.int64)}
# Sizes of tiles, of which the tests take smaller ones than a product on a chip; launches that differ in nothing else
# are one program here.
TILES = ("BLOCK", "CHUNK", "ROWS", "COLUMNS", "SLAB", "ITEMS", "T", "T64", "STAGES")
LEAST = 16  # of a product's sides

launches: dict[str, dict[str, Any]] = {}


def record() -> None:
    """From now on every kind of launch of the interpreter is noted in ``launches``."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def noted(self: Any, *values: Any, **named: Any) -> Any:
        names = inspect.getfullargspec(self.fn).args
        given = inspect.getcallargs(self.fn, *values, **{k: v for k, v in named.items() if k in names})
        found = described(self.fn, given, self.constexprs, named.get("num_warps", 4))
        alike = {k: v for k, v in found["constants"].items() if k not in TILES}
        launches.setdefault(json.dumps([found["kernel"], found["signature"], alike], sort_keys=True), found)
        return launch(self, *values, **named)

    interpreter.GridExecutor.__call__ = noted


def described(fn: Any, given: dict[str, Any], constexprs: list[str], warps: int) -> dict[str, Any]:
    """What a launch on a GPU would compile for, in JSON's own types."""
    annotations = inspect.get_annotations(fn)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    specialised: dict[str, int] = {}
    for name, value in given.items():
        if name in constexprs:
            signature[name] = "constexpr"
            constants[name] = str(value) if isinstance(value, tl.dtype) else value
        elif type(value) is int and value == 1:
            signature[name] = "constexpr"
            specialised[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp64" if "float64" in str(annotations.get(name)) else "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return {
        "kernel": f"{fn.__module__}:{fn.__name__}",
        "signature": signature,
        "constants": constants,
        "specialised": specialised,
        "warps": warps,
    }


def build(launch: dict[str, Any], capability: int) -> None:
    """Make Triton's program of a launch for an NVIDIA chip; raises what Triton raises where that cannot be done."""
    module, name = launch["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    constants = dict(on_a_chip(launch["constants"])) | launch["specialised"]
    signature = {argument: launch["signature"][argument] for argument in kernel.arg_names}
    program(kernel, signature, constants, launch["warps"], capability)


def program(kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, capability: int) -> str:
    """Triton's program of a kernel for an NVIDIA chip, as it is before anything is inlined."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": warps, "enable_fp_fusion": True})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    assert module.verify()
    return str(module)


def on_a_chip(constants: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The constants with what the interpreter has otherwise: smaller tiles, wider operands, products in 'ieee'."""
    for name, value in constants.items():
        value = DTYPES.get(value, value) if isinstance(value, str) else value
        if name in TILES:
            value = max(LEAST, value)
        elif name == "DOT":
            value = DTYPES[constants["OPERAND"]]
        elif value == "ieee" and constants["TO"] != str(tl.float64):
            value = "tf32x3"
        yield name, value

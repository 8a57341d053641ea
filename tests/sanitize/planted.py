"""Faults on purpose, each in a process of its own: whether the sanitized library reports every one.

A tensor over memory that was allocated one element too short says that it has that element; the operator believes it
(of a storage that torch knows to be too short it would not).
``python -m tests.sanitize.planted`` prints a line for each operator and argument.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import stella_kernels  # noqa: F401  (the operators)

KERNELS = torch.ops.stella_kernels


def _calls() -> dict[str, dict[str, Any]]:
    """One plain call of each operator: tensors and lists of one tensor by their names."""
    n, r, T, m = 37, 5, 19, 23
    tall = {name: torch.linalg.qr(torch.randn(n, r)).Q.contiguous() for name in ("a", "b", "c", "d")}
    hyperparameters = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 1.0, 1.0, 1.0]], dtype=torch.float64)
    x, grad_y, A = torch.randn(T, n), torch.randn(T, m), torch.randn(T, r)
    factors = {"U": torch.randn(m, r), "S": torch.randn(r, r), "Vt": torch.randn(r, n)}
    numbers = {"scale": 1.0, "p": 0.5, "seed": torch.tensor(7)}
    first = {"factors": [tall["a"]], "gradients": [tall["b"]], "exp_avgs": [tall["c"]]}
    return {
        "polar": {"M": tall["a"], "method": "auto"},
        "riemannian_gradient_": {"gradients": [tall["a"]], "factors": [tall["b"]], "snapshots": [tall["c"]]},
        "project_retract_": {"moved": [tall["a"]], "previous": [tall["b"]], "divisors": [1.0], "method": "auto"},
        "stella_adamw_": {**first, "exp_avg_sqs": [tall["d"].square()], "couplings": [torch.zeros(r, r)]}
        | {"hyperparameters": hyperparameters},
        "philox_dropout": {"x": x, "p": 0.5, "seed": torch.tensor(7)},
        "adapter_forward_": {"y": grad_y, "x": x, **factors, **numbers},
        "adapter_product": {"x": x, "b": torch.randn(m), **factors, **numbers},
        "adapter_backward_": {"grad_x": torch.randn(T, n), "beta": 1.0, "grad_y": grad_y, "x": x, "A": A}
        | {**factors, **numbers, "needed": [True] * 3},
    }


def _report(call: Callable[[], object]) -> tuple[bool, str]:
    """Whether a process that calls it ends by failing, and what it says."""
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            call()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        return status != 0, out.read().decode(errors="replace")


def _of_short_memory(tensor: Tensor) -> Tensor:
    """The tensor's values but the last, in memory that ends before it."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    tensor = tensor.contiguous()
    short = tensor.nbytes - tensor.element_size()
    address = malloc(short)
    ctypes.memmove(address, tensor.data_ptr(), short)
    memory = (ctypes.c_char * tensor.nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _short(operator: str, argument: str) -> None:
    arguments = _calls()[operator]
    value = arguments[argument]
    arguments[argument] = [_of_short_memory(value[0])] if isinstance(value, list) else _of_short_memory(value)
    getattr(KERNELS, operator)(*arguments.values())


def _misaligned() -> None:
    KERNELS.polar(
        torch.frombuffer(bytearray(b"\1" * (4 * 37 * 5 + 1)), dtype=torch.float32, offset=1).view(37, 5), "auto"
    )


def main() -> int:
    torch.set_num_threads(1)  # a child has none of its parent's others
    missed = 0
    for operator, arguments in _calls().items():
        for argument, value in arguments.items():
            if argument == "seed" or not isinstance(value[0] if isinstance(value, list) else value, Tensor):
                continue
            ended, text = _report(lambda: _short(operator, argument))  # noqa: B023
            found = ended and "AddressSanitizer: heap-buffer-overflow" in text and "_cpu.so" in text
            print(f"{operator} {argument}: {'reported' if found else 'MISSED'}", flush=True)
            missed += not found
    ended, text = _report(_misaligned)
    found = ended and "runtime error: " in text and "misaligned address" in text
    print(f"misaligned: {'reported' if found else 'MISSED'}", flush=True)
    return missed + (not found)


if __name__ == "__main__":
    sys.exit(main())

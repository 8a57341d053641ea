"""The operators of the CPU kernels on an emulated 64-bit ARM: tensors are copied there and back, memory and all."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stella_kernels.reference import philox

from .emulator import Machine

_STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_METHODS = {"auto": 0, "newton_schulz": 1, "svd": 2}


class Arm64:
    """Each operator of ``ops.py`` that has a CPU kernel, by the same name; arguments are right, nothing is checked."""

    def __init__(self, program: Path) -> None:
        self._machine = Machine(program)
        self._places: dict[int, tuple[Tensor, int]] = {}  # a storage's memory and its place there

    def operators(self) -> dict[str, Callable[..., Any]]:
        names = ("polar", "riemannian_gradient_", "project_retract_", "stella_adamw_")
        names += ("philox_dropout", "adapter_forward_", "adapter_product", "adapter_backward_")
        return {name: getattr(self, name) for name in names}

    # ---- the emulated memory -----------------------------------------------------------------------------------------

    def _place(self, t: Tensor) -> int:
        """Where the emulated machine has a tensor's first element."""
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._places:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._places[storage.data_ptr()] = whole, self._machine.put(whole.numpy().tobytes())
        return self._places[storage.data_ptr()][1] + t.data_ptr() - storage.data_ptr()

    def _view(self, t: Tensor | None) -> bytes:
        """A MatrixView of a matrix, of a vector as its one row, or of nothing."""
        if t is None:
            return bytes(48)
        rows = t if t.dim() == 2 else t[None]
        strides = rows.stride() if t.dim() == 2 else (0, t.stride(0))
        return struct.pack("<Q4qi4x", self._place(t), *rows.shape, *strides, _STORAGES[t.dtype])

    def _views(self, tensors: Sequence[Tensor | None]) -> int:
        return self._machine.put(b"".join(self._view(t) for t in tensors))

    def _doubles(self, values: Sequence[float]) -> int:
        return self._machine.put(struct.pack(f"<{len(values)}d", *values))

    def _run(self, function: str, *arguments: int) -> None:
        """Call, and copy back what is there."""
        self._machine.call(function, *arguments)
        for whole, address in self._places.values():
            if whole.numel():
                data = bytearray(self._machine.get(address, whole.numel()))
                whole.copy_(torch.frombuffer(data, dtype=torch.uint8))
        self._places.clear()
        self._machine.free_all()

    # ---- the operators -----------------------------------------------------------------------------------------------

    def polar(self, M: Tensor, method: str) -> tuple[Tensor, Tensor]:
        Q = torch.full(M.shape, torch.nan, dtype=M.dtype)
        info = torch.full((M.shape[:-2].numel(), 4), torch.nan, dtype=torch.float64)
        batch = list(itertools.product(*map(range, M.shape[:-2])))
        views = [self._views([t[i] for i in batch]) for t in (M, Q)]
        self._run("polar", *views, len(info), _METHODS[method], self._place(info))
        return Q, info

    def riemannian_gradient_(self, gradients: list[Tensor], factors: list[Tensor], snapshots: list[Tensor]) -> Tensor:
        info = torch.full((len(factors), 4), torch.nan, dtype=torch.float64)
        views = [self._views(each) if each else 0 for each in (gradients, factors, snapshots)]
        self._run("riemannian_gradient", *views, len(info), self._place(info))
        return info

    def project_retract_(
        self, moved: list[Tensor], previous: list[Tensor], divisors: list[float], method: str
    ) -> Tensor:
        info = torch.full((len(moved), 4), torch.nan, dtype=torch.float64)
        arguments = self._views(moved), self._views(previous), self._doubles(divisors)
        self._run("project_retract", *arguments, len(info), _METHODS[method], self._place(info))
        return info

    def stella_adamw_(
        self,
        factors: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        couplings: list[Tensor],
        hyperparameters: Tensor,
        skip_nonfinite: bool,
    ) -> Tensor:
        info = torch.full((len(factors), 4), torch.nan, dtype=torch.float64)
        tensors = [t for job in zip(factors, gradients, exp_avgs, exp_avg_sqs, strict=True) for t in job]
        settings = []
        for rate, beta1, beta2, eps, step, divisor, sign in hyperparameters.tolist():
            settings += [rate, beta1, beta2, eps, 1.0 - beta1**step, 1.0 - beta2**step, divisor, sign]
        known = [self._doubles(K.double().flatten().tolist()) if K.numel() else 0 for K in couplings]
        addresses = self._machine.put(struct.pack(f"<{len(known)}Q", *known))
        arguments = self._views(tensors), self._doubles(settings), addresses
        self._run("stella_adamw", *arguments, len(info), int(skip_nonfinite), self._place(info))
        return info

    def _dropout(self, p: float, seed: Tensor | None) -> int:
        if p == 0.0 or seed is None:
            return self._machine.put(struct.pack("<qQdi4x", 0, 0, 1.0, 0))
        scale = 1.0 / (1.0 - p) if p < 1.0 else torch.inf
        return self._machine.put(struct.pack("<qQdi4x", int(seed), philox.keep_threshold(p), scale, 1))

    def philox_dropout(self, x: Tensor, p: float, seed: Tensor) -> Tensor:
        out = torch.full(x.shape, torch.nan, dtype=x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        self._run("philox_dropout", self._views((rows, out.view(rows.shape))), self._dropout(p, seed))
        return out

    def adapter_forward_(
        self, y: Tensor, x: Tensor, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
    ) -> Tensor:
        return self._forward(y, x, None, True, U, S, Vt, scale, p, seed)

    def adapter_product(
        self, x: Tensor, b: Tensor | None, U: Tensor, S: Tensor, Vt: Tensor, scale: float, p: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y = torch.full((x.shape[0], U.shape[0]), torch.nan, dtype=x.dtype)
        return y, self._forward(y, x, b, False, U, S, Vt, scale, p, seed)

    def _forward(
        self,
        y: Tensor,
        x: Tensor,
        b: Tensor | None,
        accumulate: bool,
        U: Tensor,
        S: Tensor,
        Vt: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
    ) -> Tensor:
        A = torch.full((x.shape[0], U.shape[1]), torch.nan, dtype=y.dtype)
        views = self._views((x, y, A, b, U, Vt.mT, S))
        self._run(
            "adapter_forward", views, int(accumulate), S.dim() == 1, self._doubles([scale]), self._dropout(p, seed)
        )
        return A

    def adapter_backward_(
        self,
        grad_x: Tensor | None,
        beta: float,
        grad_y: Tensor,
        x: Tensor,
        A: Tensor,
        U: Tensor,
        S: Tensor,
        Vt: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = [
            torch.full(t.shape if need else (0,), torch.nan, dtype=t.dtype)
            for t, need in zip((U, S, Vt), needed, strict=True)
        ]
        of_U, of_S, of_V = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        own = of_U, None if of_V is None else of_V.mT, of_S
        views = self._views((grad_y, x, A, grad_x, U, Vt.mT, S, *own))
        self._run("adapter_backward", views, S.dim() == 1, self._doubles([scale, beta]), self._dropout(p, seed))
        return grads[0], grads[1], grads[2]

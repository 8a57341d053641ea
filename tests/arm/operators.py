"""The operators of the CPU kernels on an emulated 64-bit ARM: tensors are copied there and back, memory and all."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stella_kernels.operators import signatures
from stella_kernels.operators.status import INFO_COLUMNS
from stella_kernels.reference import philox
from tests.arm.emulator import Machine

_STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_METHODS = {"auto": 0, "newton_schulz": 1, "svd": 2}


class Arm64:
    """Each operator, by its name; arguments are right, nothing is checked."""

    def __init__(self, program: Path) -> None:
        self._machine = Machine(program)
        self._places: dict[int, tuple[Tensor, int]] = {}  # a storage's memory and its place there

    def operators(self) -> dict[str, Callable[..., Any]]:
        return {each.name: signatures.positional(each, getattr(self, each.name)) for each in signatures.SIGNATURES}

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

    def polar(self, a: signatures.Polar) -> tuple[Tensor, Tensor]:
        Q = torch.full(a.M.shape, torch.nan, dtype=a.M.dtype)
        info = torch.full((a.M.shape[:-2].numel(), INFO_COLUMNS), torch.nan, dtype=torch.float64)
        batch = list(itertools.product(*map(range, a.M.shape[:-2])))
        views = [self._views([t[i] for i in batch]) for t in (a.M, Q)]
        self._run("polar", *views, len(info), _METHODS[a.method], self._place(info))
        return Q, info

    def riemannian_gradient_(self, a: signatures.RiemannianGradient) -> Tensor:
        info = torch.full((len(a.factors), INFO_COLUMNS), torch.nan, dtype=torch.float64)
        views = [self._views(each) if each else 0 for each in (a.gradients, a.factors, a.snapshots)]
        self._run("riemannian_gradient", *views, len(info), self._place(info))
        return info

    def project_retract_(self, a: signatures.ProjectRetract) -> Tensor:
        info = torch.full((len(a.moved), INFO_COLUMNS), torch.nan, dtype=torch.float64)
        arguments = self._views(a.moved), self._views(a.previous), self._doubles(a.divisors)
        self._run("project_retract", *arguments, len(info), _METHODS[a.method], self._place(info))
        return info

    def stella_adamw_(self, a: signatures.StellaAdamWStep) -> Tensor:
        info = torch.full((len(a.factors), INFO_COLUMNS), torch.nan, dtype=torch.float64)
        tensors = [t for job in zip(a.factors, a.gradients, a.exp_avgs, a.exp_avg_sqs, strict=True) for t in job]
        settings = []
        for rate, beta1, beta2, eps, step, divisor, sign in a.hyperparameters.tolist():
            settings += [rate, beta1, beta2, eps, 1.0 - beta1**step, 1.0 - beta2**step, divisor, sign]
        known = [self._doubles(K.double().flatten().tolist()) if K.numel() else 0 for K in a.couplings]
        addresses = self._machine.put(struct.pack(f"<{len(known)}Q", *known))
        arguments = self._views(tensors), self._doubles(settings), addresses
        self._run("stella_adamw", *arguments, len(info), self._place(info))
        return info

    def _dropout(self, p: float, seed: Tensor | None) -> int:
        if p == 0.0 or seed is None:
            return self._machine.put(struct.pack("<qQdi4x", 0, 0, 1.0, 0))
        return self._machine.put(struct.pack("<qQdi4x", int(seed), philox.keep_threshold(p), philox.kept_scale(p), 1))

    def philox_dropout(self, a: signatures.PhiloxDropout) -> Tensor:
        out = torch.full(a.x.shape, torch.nan, dtype=a.x.dtype)
        rows = a.x.reshape(-1, a.x.shape[-1])
        self._run("philox_dropout", self._views((rows, out.view(rows.shape))), self._dropout(a.p, a.seed))
        return out

    def adapter_forward_(self, a: signatures.AdapterForward) -> Tensor:
        return self._forward(a.y, None, True, a)

    def adapter_product(self, a: signatures.AdapterProduct) -> tuple[Tensor, Tensor]:
        y = torch.full((a.x.shape[0], a.U.shape[0]), torch.nan, dtype=a.x.dtype)
        return y, self._forward(y, a.b, False, a)

    def _forward(
        self,
        y: Tensor,
        b: Tensor | None,
        accumulate: bool,
        a: signatures.AdapterForward | signatures.AdapterProduct,
    ) -> Tensor:
        A = torch.full((a.x.shape[0], a.U.shape[1]), torch.nan, dtype=y.dtype)
        views = self._views((a.x, y, A, b, a.U, a.Vt.mT, a.S))
        numbers, dropout = self._doubles([a.scale]), self._dropout(a.p, a.seed)
        self._run("adapter_forward", views, int(accumulate), a.S.dim() == 1, numbers, dropout)
        return A

    def adapter_backward_(self, a: signatures.AdapterBackward) -> tuple[Tensor, Tensor, Tensor]:
        grads = [
            torch.full(t.shape if need else (0,), torch.nan, dtype=t.dtype)
            for t, need in zip((a.U, a.S, a.Vt), a.needed, strict=True)
        ]
        of_U, of_S, of_V = (grad if need else None for grad, need in zip(grads, a.needed, strict=True))
        own = of_U, None if of_V is None else of_V.mT, of_S
        views = self._views((a.grad_y, a.x, a.A, a.grad_x, a.U, a.Vt.mT, a.S, *own))
        numbers, dropout = self._doubles([a.scale, a.beta]), self._dropout(a.p, a.seed)
        self._run("adapter_backward", views, a.S.dim() == 1, numbers, dropout)
        return grads[0], grads[1], grads[2]

"""Calls of the adapter's operators and of its dropout: any shapes, memory and values, judged by the float64 reference.

An error is relative to the result of the same sums of magnitudes, where nothing cancels: five roundings to the storage
type, sums of up to max(T, m, n, r) terms, as in ``verification/adapter_runners.py``.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from stella_kernels.operators.fallback import REFERENCE
from stella_kernels.reference import philox
from tests.sanitize.case import Call, Complaints, away, round_offs
from tests.sanitize.layouts import DTYPES, KINDS, MOST_RANKS, Held, hold, sizes_around, values

_PROBABILITIES = (0.0, 0.0, 0.0, 0.1, 0.5, 1e-12, 1.0 - 1e-12, 1.0)
_WORK = 1_000_000  # (T + r) (m + n) r at most


def _sizes(random: Random) -> tuple[int, int, int, int]:
    """T, m, n, r."""
    r = sizes_around(random, random.choice(MOST_RANKS))
    m, n = (sizes_around(random, random.choice((40, 300, 2000))) for _ in range(2))
    if random.random() < 0.15:
        m = n
    work = _WORK * random.choice((1,) * 9 + (6,))
    T = max(1, min(sizes_around(random, random.choice((20, 150, 600))), work // ((m + n) * r)))
    if random.random() < 0.06:
        sizes = [T, m, n, r]
        for which in random.sample(range(4), random.choice((1, 1, 2))):
            sizes[which] = 0
        T, m, n, r = sizes
    return T, m, n, r


class _Layer:
    """What the three operators of the adapter share."""

    def __init__(self, random: Random, generator: torch.Generator) -> None:
        self.random, self.generator = random, generator
        self.T, self.m, self.n, self.r = _sizes(random)
        self.dtype, self.kind = random.choice(DTYPES), random.choice(KINDS)
        masters = random.choice((torch.float32, torch.float32, torch.float64, self.dtype))
        shape = (self.r,) if random.random() < 0.3 else (self.r, self.r)
        self.U = hold(random, self.value((self.m, self.r), self.m).to(masters))
        self.S = hold(random, self.value(shape, self.r if len(shape) == 2 else 1).to(masters))
        V = self.value((self.n, self.r), self.n).to(masters)
        self.Vt = hold(random, V.mT)
        if self.m == self.n and random.random() < 0.2:  # both factors of one memory
            self.Vt = Held(self.U.view.mT, self.U.memory, self.U.before)
        self.scale = random.choice((1.7, 1.0, 0.0, -3.0))
        self.p = random.choice(_PROBABILITIES)
        at = torch.tensor(random.choice((0, 1, -1, 2**63 - 1, -(2**63), random.getrandbits(62))))
        self.seed = Held(at, at.reshape(1), at.reshape(1).clone()) if self.p or random.random() < 0.2 else None

    def value(self, shape: tuple[int, ...], summed: int) -> Tensor:
        """Of size one when ``summed`` products with it are added."""
        scale = math.sqrt(max(summed, 1)) if self.kind == "gaussian" else 1.0
        return values(self.random, shape, self.dtype, self.kind, self.generator) / scale

    def rows(self, columns: int, written: bool = False, dtype: torch.dtype | None = None) -> Held:
        return hold(self.random, self.value((self.T, columns), 1).to(dtype or self.dtype), written)

    def input(self) -> Held:
        """x, mostly of the dtype of y."""
        return self.rows(self.n, dtype=random_dtype(self.random, self.dtype))

    def call(self, operator: str, arguments: dict[str, Any], shapes: list[tuple[int, ...]]) -> Call:
        """``shapes`` of what is returned; what is written in place is compared as well."""
        names = [name for name, each in arguments.items() if isinstance(each, Held) and each.written]
        exact = _wide(arguments) if self.kind == "gaussian" else {}

        def judge(results: Any) -> Complaints:
            results = results if isinstance(results, (tuple, list)) else (results,)
            found = [f"result {i}: {tuple(t.shape)}" for i, (t, s) in enumerate(zip(results, shapes)) if t.shape != s]  # noqa: B905
            if found or not exact:
                return found
            got = [*results, *(arguments[name].view for name in names)]
            right, most = (_reference(operator, given, names) for given in (exact, _magnitudes(exact)))
            u, w = round_offs(self.dtype)
            stored = [each.view.dtype for each in (self.U, self.S, self.Vt)]
            u = max(u, *(torch.finfo(each).eps / 2 for each in stored)) if operator == "adapter_backward_" else u
            tolerance = 32 * (u + w * math.sqrt(max(self.T, self.m, self.n, self.r, 1)))
            for i, (value, wanted, size) in enumerate(zip(got, right, most, strict=True)):
                found += away(f"result {i}", value, wanted, tolerance, size=float(size.norm()))
            return found

        return Call(operator, arguments, judge, kind=self.kind)

    def last(self) -> dict[str, Any]:
        return {"U": self.U, "S": self.S, "Vt": self.Vt, "scale": self.scale, "p": self.p, "seed": self.seed}


def random_dtype(random: Random, dtype: torch.dtype) -> torch.dtype:
    return random.choice(DTYPES) if random.random() < 0.15 else dtype


def _wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64 and memory of their own."""

    def wide(each: Any) -> Any:
        if not isinstance(each, Held):
            return each
        return each.view.double().clone() if each.view.is_floating_point() else each.view.clone()

    return {name: wide(each) for name, each in arguments.items()}


def _magnitudes(exact: dict[str, Any]) -> dict[str, Any]:
    def magnitude(name: str, each: Any) -> Any:
        return each if name in ("seed", "p") or each is None or isinstance(each, list) else abs(each)

    return {name: magnitude(name, each) for name, each in exact.items()}


def _reference(operator: str, given: dict[str, Any], names: list[str]) -> list[Tensor]:
    own = {name: each.clone() if isinstance(each, Tensor) else each for name, each in given.items()}
    results = REFERENCE[operator](*own.values())
    return [*(results if isinstance(results, tuple) else (results,)), *(own[name] for name in names)]


def adapter_forward_(random: Random, generator: torch.Generator) -> Call:
    layer = _Layer(random, generator)
    y = layer.rows(layer.m, written=True)
    return layer.call("adapter_forward_", {"y": y, "x": layer.input(), **layer.last()}, [(layer.T, layer.r)])


def adapter_product(random: Random, generator: torch.Generator) -> Call:
    layer = _Layer(random, generator)
    b = (
        hold(random, layer.value((layer.m,), 1).to(random_dtype(random, layer.dtype)))
        if random.random() < 0.5
        else None
    )
    shapes = [(layer.T, layer.m), (layer.T, layer.r)]
    return layer.call("adapter_product", {"x": layer.rows(layer.n), "b": b, **layer.last()}, shapes)


def adapter_backward_(random: Random, generator: torch.Generator) -> Call:
    layer = _Layer(random, generator)
    beta = random.choice((0.0, 0.0, 1.0, -0.5))
    grad_x = layer.rows(layer.n, written=True) if random.random() < 0.75 else None
    if grad_x and beta == 0.0:  # whatever it holds does not count
        grad_x.view.fill_(torch.nan)
        grad_x.before.copy_(grad_x.memory)
    grad_y, x = layer.rows(layer.m), layer.input()
    if layer.m == layer.n and random.random() < 0.3:  # one tensor for both
        x = grad_y
    needed = [random.random() < 0.7 for _ in range(3)]
    first = {"grad_x": grad_x, "beta": beta, "grad_y": grad_y, "x": x, "A": layer.rows(layer.r)}
    shapes = [
        tuple(each.view.shape) if need else (0,)
        for each, need in zip((layer.U, layer.S, layer.Vt), needed, strict=True)
    ]
    return layer.call("adapter_backward_", {**first, **layer.last(), "needed": needed}, shapes)


def philox_dropout(random: Random, generator: torch.Generator) -> Call:
    dtype, kind = random.choice(DTYPES), random.choice(KINDS)
    dims = random.choice((0, 1, 2, 2, 2, 3, 4))
    shape = tuple(
        0 if random.random() < 0.02 else sizes_around(random, (4000, 1500, 60, 12)[max(dims, 1) - 1])
        for _ in range(dims)
    )
    while math.prod(shape) > 200_000:
        shape = tuple((size + 1) // 2 for size in shape)
    x = hold(random, values(random, shape, dtype, kind, generator).to(dtype))
    p = random.choice(_PROBABILITIES)
    at = torch.tensor(random.getrandbits(63) - 2**62)
    seed = Held(at, at.reshape(1), at.reshape(1).clone())

    def judge(kept: Tensor) -> Complaints:
        if kept.shape != x.view.shape or kept.dtype != dtype:
            return [f"kept: {tuple(kept.shape)} {kept.dtype}"]
        mask = philox.dropout_mask(x.view.shape, p, seed.view) if p else torch.ones(shape, dtype=torch.bool)
        if bool((kept != 0)[~mask].any()):
            return ["an element that is dropped is not 0"]
        if kind != "gaussian":
            return []
        exact = torch.where(mask, x.view.double() * philox.kept_scale(p), 0.0)
        largest = torch.finfo(dtype).max
        return away("kept", kept, exact, 2 * round_offs(dtype)[0]) if float(exact.abs().sum()) < largest else []

    return Call("philox_dropout", {"x": x, "p": p, "seed": seed}, judge, kind=kind)

"""Every instruction of a lane's own that the emulator knows, by what PTX ISA says of it, in numpy.

A row: opcode, type of the result, types of the operands, definition. Types are PTX's; those of 8 bits are in registers
of 16. A definition takes arrays of the operands' types; what is approximate has a tolerance in units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

TYPES: dict[str, type[np.generic]] = {
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": getattr(np, f"uint{bits}") for bits in (16, 32, 64)},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "pred": np.bool_},
}


@dataclass(frozen=True)
class Row:
    opcode: str
    result: str
    operands: tuple[str, ...]
    definition: Callable[..., Array]
    ulps: float = 0.0


def nearest(value: Fraction, digits: int, least: int, away: bool = False) -> float:
    """The float of so many digits, with no unit below 2^least, next to a number; ties to even, or away from zero."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    count = int(size / unit + Fraction(1, 2)) if away else round(size / unit)
    rounded = count * unit
    if rounded >= Fraction(2) ** 1024:
        return float("inf") if value > 0 else float("-inf")
    return float(rounded) * (1 if value > 0 else -1)


FORMATS = {np.float32: (24, -149), np.float64: (53, -1074)}


def fused(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once."""
    kind = a.dtype.type
    with np.errstate(all="ignore"):
        out = a * b + c
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:  # of zero the sign is numpy's
            with np.errstate(over="ignore"):
                out[i] = kind(nearest(exact, *FORMATS[kind]))
    return out


def wide(kind: type[np.generic], twice: type[np.generic]) -> Callable[..., Array]:
    return lambda a, b: a.astype(twice) * b.astype(twice)


def high(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    exact = [int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)]
    return np.array([x & (2**bits - 1) for x in exact], dtype=f"uint{bits}").view(a.dtype)


def quotient(a: Array, b: Array) -> Array:
    """Towards zero."""
    signs = [1 if (x < 0) == (y < 0) else -1 for x, y in zip(a, b, strict=True)]
    out = [s * (abs(int(x)) // abs(int(y))) if y else -1 for s, x, y in zip(signs, a, b, strict=True)]
    return wrapped(out, a.dtype)


def remainder(a: Array, b: Array) -> Array:
    out = [(abs(int(x)) % abs(int(y))) * (-1 if x < 0 else 1) if y else -1 for x, y in zip(a, b, strict=True)]
    return wrapped(out, a.dtype)


def wrapped(values: list[int], dtype: np.dtype[Any]) -> Array:
    bits = 8 * dtype.itemsize
    return np.array([v & (2**bits - 1) for v in values], dtype=f"uint{bits}").view(dtype)


def shift(left: bool) -> Callable[..., Array]:
    def define(a: Array, by: Array) -> Array:
        bits = 8 * a.dtype.itemsize
        out = [int(x) << min(int(n), 64) if left else int(x) >> min(int(n), 64) for x, n in zip(a, by, strict=True)]
        return wrapped([v & (2**bits - 1) for v in out], a.dtype)

    return define


def field(a: Array, position: Array, length: Array) -> Array:
    """bfe: past the highest bit zeros, or copies of the field's last bit inside the operand."""
    bits, signed = 8 * a.dtype.itemsize, a.dtype.kind == "i"
    out = []
    for x, p, n in zip(a, position & 255, length & 255, strict=True):
        value = int(x) & (2**bits - 1)
        last = min(int(p) + int(n) - 1, bits - 1)
        fill = signed and n > 0 and value >> last & 1
        picked = [value >> (int(p) + i) & 1 if i < n and int(p) + i < bits else int(bool(fill)) for i in range(bits)]
        out.append(sum(bit << i for i, bit in enumerate(picked)))
    return wrapped(out, a.dtype)


def permuted(a: Array, b: Array, selectors: Array) -> Array:
    out = []
    for x, y, s in zip(a, b, selectors, strict=True):
        given = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        made = [given[s >> 4 * i & 7] for i in range(4)]
        made = [255 * (byte >> 7) if int(s) >> 4 * i & 8 else byte for i, byte in enumerate(made)]
        out.append(int.from_bytes(bytes(made), "little"))
    return np.array(out, dtype=np.uint32)


def funnel(left: bool, wrap: bool) -> Callable[..., Array]:
    def define(low: Array, top: Array, by: Array) -> Array:
        out = []
        for x, y, n in zip(low, top, by, strict=True):
            count = int(n) & 31 if wrap else min(int(n), 32)
            both = int(y) << 32 | int(x)
            out.append(both << count >> 32 if left else both >> count)
        return wrapped(out, np.dtype(np.uint32))

    return define


def extreme(least: bool, nan: bool = False) -> Callable[..., Array]:
    def define(a: Array, b: Array) -> Array:
        ways = (np.minimum, np.maximum) if nan else (np.fmin, np.fmax)
        out = ways[0](a, b) if least else ways[1](a, b)
        equal = a == b  # -0 is less than +0
        return np.where(equal, np.where(np.signbit(a) == least, a, b), out)

    return define


def flush(a: Array) -> Array:
    tiny = (np.abs(a) < np.finfo(a.dtype).tiny) & (a != 0)
    return np.where(tiny, np.copysign(a.dtype.type(0), a), a)


def flushing(define: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: flush(define(*map(flush, operands)))


def in_double(define: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: define(*(a.astype(np.float64) for a in operands))


def gross(a: Array) -> Array:
    def upper(x: Array) -> Array:
        return (x.view(np.uint64) >> np.uint64(32) << np.uint64(32)).view(np.float64)

    return flush(upper(1.0 / flush(upper(a))))


def pairs(define: Callable[..., Array]) -> Callable[..., Array]:
    def both(*operands: Array) -> Array:
        return define(*(a.view(np.float32) for a in operands)).astype(np.float32).view(np.uint64)

    return both


def bfloat16(a: Array) -> Array:
    if a.dtype == np.float64:  # torch goes by way of float
        a = np.array([nearest(Fraction(x), 8, -133) if np.isfinite(x) and x else x for x in a.tolist()])
    with np.errstate(over="ignore"):
        a = a.astype(np.float32)
    return torch.from_numpy(a.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(a: Array) -> Array:
    return (a.astype(np.uint32) << 16).view(np.float32)


def half(a: Array) -> Array:
    return a.astype(np.float16).view(np.uint16)


def packed(narrow: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda upper, lower: narrow(upper).astype(np.uint32) << 16 | narrow(lower)


def tf32(a: Array) -> Array:
    out = a.copy()
    for i in np.flatnonzero(np.isfinite(a) & (a != 0)):
        out[i] = np.float32(nearest(Fraction(float(a[i])), 11, -136, away=True))
    return out


def to_integer(kind: type[np.generic], how: Callable[[Array], Array]) -> Callable[..., Array]:
    def define(a: Array) -> Array:
        limits = np.iinfo(kind)
        ends = {np.inf: int(limits.max), -np.inf: int(limits.min)}
        out = [0 if np.isnan(x) else ends[x] if np.isinf(x) else int(x) for x in how(a)]
        return np.array([min(max(x, limits.min), limits.max) for x in out], dtype=kind)

    return define


def comparisons(kind: str) -> Iterator[tuple[str, Callable[..., Array]]]:
    if kind[0] != "b":
        yield from {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}.items()
    yield "eq", np.equal
    if kind[0] != "f":
        yield "ne", np.not_equal
        return

    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    yield "ne", lambda a, b: (a != b) & ~unordered(a, b)
    yield "num", lambda a, b: ~unordered(a, b)
    yield "nan", unordered
    for name, define in (("eq", np.equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater)):
        yield name + "u", lambda a, b, define=define: define(a, b) | unordered(a, b)
    yield "geu", lambda a, b: np.greater_equal(a, b) | unordered(a, b)
    yield "neu", lambda a, b: (a != b) | unordered(a, b)

"""The table of instructions: families of rows over the definitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.ptx.instructions import definitions as of
from tests.ptx.instructions.definitions import TYPES, Row


def integers() -> Iterator[Row]:
    for bits in (16, 32, 64):
        for sign in "su":
            t = f"{sign}{bits}"
            two = (t, t)
            yield Row(f"add.{t}", t, two, np.add)
            yield Row(f"sub.{t}", t, two, np.subtract)
            yield Row(f"mul.lo.{t}", t, two, np.multiply)
            yield Row(f"min.{t}", t, two, np.minimum)
            yield Row(f"max.{t}", t, two, np.maximum)
            yield Row(f"div.{t}", t, two, of.quotient)
            yield Row(f"rem.{t}", t, two, of.remainder)
            yield Row(f"shr.{t}", t, (t, "u32"), of.shift(left=False))
            if bits > 16:
                yield Row(f"mul.hi.{t}", t, two, of.high)
                yield Row(f"mad.lo.{t}", t, (t, t, t), lambda a, b, c: a * b + c)
                yield Row(f"bfe.{t}", t, (t, "u32", "u32"), of.field)
            if bits < 64:
                twice = f"{sign}{2 * bits}"
                product = of.wide(TYPES[t], TYPES[twice])
                yield Row(f"mul.wide.{t}", twice, two, product)
                if bits == 32:
                    yield Row(f"mad.wide.{t}", twice, (t, t, twice), lambda a, b, c, f=product: f(a, b) + c)
        yield Row(f"neg.s{bits}", f"s{bits}", (f"s{bits}",), np.negative)
        yield Row(f"abs.s{bits}", f"s{bits}", (f"s{bits}",), np.abs)


def logic() -> Iterator[Row]:
    for bits in (16, 32, 64):
        t = f"b{bits}"
        yield Row(f"and.{t}", t, (t, t), np.bitwise_and)
        yield Row(f"or.{t}", t, (t, t), np.bitwise_or)
        yield Row(f"xor.{t}", t, (t, t), np.bitwise_xor)
        yield Row(f"not.{t}", t, (t,), np.invert)
        yield Row(f"shl.{t}", t, (t, "u32"), of.shift(left=True))
        yield Row(f"shr.{t}", t, (t, "u32"), of.shift(left=False))
        for kind in "busf" if bits > 16 else "bus":
            yield Row(f"selp.{kind}{bits}", t, (t, t, "pred"), lambda a, b, p: np.where(p, a, b))
            yield Row(f"mov.{kind}{bits}", t, (t,), np.copy)
    yield Row("and.pred", "pred", ("pred", "pred"), np.logical_and)
    yield Row("or.pred", "pred", ("pred", "pred"), np.logical_or)
    yield Row("xor.pred", "pred", ("pred", "pred"), np.logical_xor)
    yield Row("not.pred", "pred", ("pred",), np.logical_not)
    yield Row("mov.pred", "pred", ("pred",), np.copy)
    for left in (True, False):
        for wrap in (True, False):
            name = f"shf.{'l' if left else 'r'}.{'wrap' if wrap else 'clamp'}.b32"
            yield Row(name, "b32", ("b32", "b32", "u32"), of.funnel(left, wrap))
    yield Row("prmt.b32", "b32", ("b32", "b32", "b32"), of.permuted)
    for bits in (32, 64):
        zeros = lambda a, bits=bits: np.array([bits - int(x).bit_length() for x in a], dtype=np.uint32)  # noqa: E731
        yield Row(f"clz.b{bits}", "u32", (f"b{bits}",), zeros)
        ones = lambda a: np.array([int(x).bit_count() for x in a], dtype=np.uint32)  # noqa: E731
        yield Row(f"popc.b{bits}", "u32", (f"b{bits}",), ones)


def comparisons() -> Iterator[Row]:
    for t in (*(f"{sign}{bits}" for bits in (16, 32, 64) for sign in "bsu"), "f32", "f64"):
        for name, define in of.comparisons(t):
            yield Row(f"setp.{name}.{t}", "pred", (t, t), define)
            joined = lambda a, b, p, define=define: define(a, b) & p  # noqa: E731
            yield Row(f"setp.{name}.and.{t}", "pred", (t, t, "pred"), joined)
            either = lambda a, b, p, define=define: define(a, b) | p  # noqa: E731
            yield Row(f"setp.{name}.or.{t}", "pred", (t, t, "pred"), either)


def floats() -> Iterator[Row]:
    for t in ("f32", "f64"):
        two = (t, t)
        for rounding in ("", "rn."):
            yield Row(f"add.{rounding}{t}", t, two, np.add)
            yield Row(f"sub.{rounding}{t}", t, two, np.subtract)
            yield Row(f"mul.{rounding}{t}", t, two, np.multiply)
        yield Row(f"div.rn.{t}", t, two, np.divide)
        yield Row(f"fma.rn.{t}", t, (t, t, t), of.fused)
        yield Row(f"sqrt.rn.{t}", t, (t,), np.sqrt)
        yield Row(f"rcp.rn.{t}", t, (t,), lambda a: a.dtype.type(1) / a)
        yield Row(f"neg.{t}", t, (t,), np.negative)
        yield Row(f"abs.{t}", t, (t,), np.abs)
        yield Row(f"min.{t}", t, two, of.extreme(least=True))
        yield Row(f"max.{t}", t, two, of.extreme(least=False))
        yield Row(f"copysign.{t}", t, two, lambda a, b: np.copysign(b, a))
    yield Row("abs.ftz.f32", "f32", ("f32",), of.flushing(np.abs))
    yield Row("min.NaN.f32", "f32", ("f32", "f32"), of.extreme(least=True, nan=True))
    yield Row("max.NaN.f32", "f32", ("f32", "f32"), of.extreme(least=False, nan=True))
    for name, least, nan in (("min", True, ""), ("max", False, ""), ("min", True, ".NaN"), ("max", False, ".NaN")):
        two = of.extreme(least, bool(nan))
        three = lambda a, b, c, two=two: two(two(a, b), c)  # noqa: E731
        yield Row(f"{name}{nan}.f32(3)", "f32", ("f32", "f32", "f32"), three)
    for name, define, count in (
        ("add", np.add, 2),
        ("sub", np.subtract, 2),
        ("mul", np.multiply, 2),
        ("fma", of.fused, 3),
    ):
        for rounding in ("rn.",) if name == "fma" else ("", "rn."):
            yield Row(f"{name}.{rounding}f32x2", "f32x2", ("f32x2",) * count, of.pairs(define))


def approximations() -> Iterator[Row]:
    """Errors as the descriptions of the instructions give them."""
    for name, define, ulps in (
        ("rcp", lambda a: 1 / a, 1),
        ("sqrt", np.sqrt, 1),
        ("rsqrt", lambda a: 1 / np.sqrt(a), 2),
        ("ex2", np.exp2, 2),
        ("lg2", np.log2, 4),  # past (0.5, 2), where the bound is absolute: the test takes 2^-22.6 there
    ):
        exact = of.in_double(define)
        yield Row(f"{name}.approx.f32", "f32", ("f32",), exact, ulps)
        flushed = lambda a, exact=exact: exact(of.flush(a))  # noqa: E731
        yield Row(f"{name}.approx.ftz.f32", "f32", ("f32",), flushed, ulps)
    yield Row("div.full.f32", "f32", ("f32", "f32"), of.in_double(np.divide), 2)
    flushed = lambda a, b: of.in_double(np.divide)(of.flush(a), of.flush(b))  # noqa: E731
    yield Row("div.full.ftz.f32", "f32", ("f32", "f32"), flushed, 2)
    yield Row("rcp.approx.ftz.f64", "f64", ("f64",), of.gross)


def conversions() -> Iterator[Row]:
    whole = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "su"]
    for to in whole:
        for source in whole:
            yield Row(f"cvt.{to}.{source}", to, (source,), lambda a, to=to: a.astype(TYPES[to]))
    for real in ("f32", "f64"):
        for integer in whole[4:]:
            yield Row(f"cvt.rn.{real}.{integer}", real, (integer,), lambda a, real=real: a.astype(TYPES[real]))
            for how, rounding in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
                yield Row(f"cvt.{how}.{integer}.{real}", integer, (real,), of.to_integer(TYPES[integer], rounding))
        for how, rounding in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            yield Row(f"cvt.{how}.{real}.{real}", real, (real,), rounding)
    yield Row("cvt.f64.f32", "f64", ("f32",), lambda a: a.astype(np.float64))
    yield Row("cvt.rn.f32.f64", "f32", ("f64",), lambda a: a.astype(np.float32))
    yield Row("cvt.f32.bf16", "f32", ("bf16",), of.from_bfloat16)
    yield Row("cvt.f32.f16", "f32", ("f16",), lambda a: a.astype(np.float32))
    yield Row("cvt.f64.bf16", "f64", ("bf16",), lambda a: of.from_bfloat16(a).astype(np.float64))
    yield Row("cvt.f64.f16", "f64", ("f16",), lambda a: a.astype(np.float64))
    yield Row("cvt.rn.bf16.f64", "bf16", ("f64",), of.bfloat16)
    yield Row("cvt.rn.f16.f64", "f16", ("f64",), lambda a: a.astype(np.float16))
    yield Row("cvt.rn.bf16.f32", "bf16", ("f32",), of.bfloat16)
    yield Row("cvt.rn.f16.f32", "f16", ("f32",), lambda a: a.astype(np.float16))
    yield Row("cvt.rn.bf16x2.f32", "bf16x2", ("f32", "f32"), of.packed(of.bfloat16))
    yield Row("cvt.rn.f16x2.f32", "f16x2", ("f32", "f32"), of.packed(of.half))
    yield Row("cvt.rna.tf32.f32", "f32", ("f32",), of.tf32)


ROWS: dict[str, Row] = {
    row.opcode: row
    for family in (integers, logic, comparisons, floats, approximations, conversions)
    for row in family()
}

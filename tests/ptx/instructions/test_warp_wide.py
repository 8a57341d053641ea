"""Instructions of a whole warp against their definitions: shuffles, reductions, matrix loads and products."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce

import pytest
import torch

from tests.ptx import emulator

LANE = "cvt.u64.u32 %i, %l;"
REGISTERS = ".reg .b64 %i; .reg .b64 %at; .reg .b32 %s;"


def shuffled(mode: str, values: list[int], by: list[int], clamp: int, segment: int) -> list[int]:
    """PTX ISA's program for shfl.sync, lane by lane."""
    out = []
    for lane in range(32):
        last = (lane & segment) | (clamp & ~segment)
        first = lane & segment
        b = by[lane] & 31
        if mode == "up":
            source, inside = lane - b, lane - b >= last
        elif mode == "down":
            source, inside = lane + b, lane + b <= last
        elif mode == "bfly":
            source, inside = lane ^ b, lane ^ b <= last
        else:
            source = first | (b & ~segment)
            inside = source <= last
        out.append(values[source if inside else lane])
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("segment", [0, 0b11000, 0b10000])
def test_shuffle(mode: str, segment: int) -> None:
    values = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32)
    by = torch.randint(0, 32, (32,), dtype=torch.int32)
    clamp = 0 if mode == "up" else 31
    out = torch.zeros(32, dtype=torch.int32)
    body = f"""{LANE}
    mad.lo.u64 %at, %i, 4, %a0; ld.global.b32 %v, [%at];
    mad.lo.u64 %at, %i, 4, %a1; ld.global.b32 %b, [%at];
    shfl.sync.{mode}.b32 %v, %v, %b, {segment << 8 | clamp}, -1;
    mad.lo.u64 %at, %i, 4, %a2; st.global.b32 [%at], %v;"""
    emulator.kernel_of(body, 3, REGISTERS + ".reg .b32 %v; .reg .b32 %b;").run(values, by, out)
    assert out.tolist() == shuffled(mode, values.tolist(), by.tolist(), clamp, segment)


def unsigned(x: int) -> int:
    return x & 0xFFFFFFFF


REDUCTIONS: dict[str, Callable[[list[int]], int]] = {
    "add.s32": lambda v: unsigned(sum(v)),
    "add.u32": lambda v: unsigned(sum(v)),
    "min.s32": lambda v: unsigned(min(v)),
    "max.s32": lambda v: unsigned(max(v)),
    "min.u32": lambda v: min(map(unsigned, v)),
    "max.u32": lambda v: max(map(unsigned, v)),
    "and.b32": lambda v: unsigned(reduce(int.__and__, v)),
    "or.b32": lambda v: unsigned(reduce(int.__or__, v)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name: str) -> None:
    values = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32)
    values |= 0x10100 if name.startswith("and") else 0
    out = torch.zeros(32, dtype=torch.int32)
    body = f"""{LANE}
    mad.lo.u64 %at, %i, 4, %a0; ld.global.b32 %v, [%at];
    redux.sync.{name} %v, %v, -1;
    mad.lo.u64 %at, %i, 4, %a1; st.global.b32 [%at], %v;"""
    emulator.kernel_of(body, 2, REGISTERS + ".reg .b32 %v;").run(values, out)
    assert {unsigned(v) for v in out.tolist()} == {REDUCTIONS[name](values.tolist())}


def listed(name: str, count: int) -> str:
    return "{" + ", ".join(f"%{name}{j}" for j in range(count)) + "}"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_load_and_store(count: int, transposed: bool) -> None:
    """Lane l has elements 2 (l % 4) and the next of row l / 4, or of column l / 4 where transposed."""
    name = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    given = torch.randint(-(2**15), 2**15, (8 * count, 8), dtype=torch.int16)
    found = torch.zeros(32, count, dtype=torch.int32)
    back = torch.zeros(8 * count, 8, dtype=torch.int16)
    size = 128 * count
    body = f"""{LANE}
    setp.lt.u32 %p, %l, {8 * count};
    mul.lo.u32 %s, %l, 16;
    cvt.u64.u32 %at, %s; add.u64 %at, %at, %a0;
    @%p ld.global.v4.b32 {listed("w", 4)}, [%at];
    @%p st.shared.v4.b32 [%s], {listed("w", 4)};
    bar.sync 0;
    selp.b32 %s, %s, 0, %p;
    ldmatrix.sync.aligned.{name} {listed("w", count)}, [%s];
    mad.lo.u64 %at, %i, {4 * count}, %a1;
    """ + "".join(f"st.global.b32 [%at+{4 * j}], %w{j};" for j in range(count))
    body += f"""
    stmatrix.sync.aligned.{name} [%s+{size}], {listed("w", count)};
    bar.sync 0;
    mul.lo.u32 %s, %l, 16;
    cvt.u64.u32 %at, %s; add.u64 %at, %at, %a2;
    @%p ld.shared.v4.b32 {listed("w", 4)}, [%s+{size}];
    @%p st.global.v4.b32 [%at], {listed("w", 4)};"""
    kernel = emulator.kernel_of(body, 3, REGISTERS + ".reg .b32 %w<4>; .reg .pred %p;")
    kernel.run(given, found, back, shared=2 * size)
    for j in range(count):
        matrix = given[8 * j : 8 * j + 8]
        matrix = matrix.mT if transposed else matrix
        for lane in range(32):
            low = int(matrix[lane // 4, 2 * (lane % 4)]) & 0xFFFF
            high = int(matrix[lane // 4, 2 * (lane % 4) + 1]) & 0xFFFF
            assert unsigned(int(found[lane, j])) == high << 16 | low
    assert torch.equal(back, given)


def a_elements(lane: int, which: int, k: int, bits: int) -> list[tuple[int, int]]:
    """Row and column of the elements of A in a register, by PTX ISA's figures of the fragments."""
    group, within = divmod(lane, 4)
    if bits == 64:
        return [(group, within)]
    if bits == 32:
        return [(group + 8 * (which % 2), within + 4 * (which // 2))]
    first = 2 * within + 8 * (which // 2)
    return [(group + 8 * (which % 2), first), (group + 8 * (which % 2), first + 1)]


def b_elements(lane: int, which: int, bits: int) -> list[tuple[int, int]]:
    group, within = divmod(lane, 4)
    if bits == 64:
        return [(within, group)]
    if bits == 32:
        return [(within + 4 * which, group)]
    first = 2 * within + 8 * which
    return [(first, group), (first + 1, group)]


PRODUCTS = {  # rows, K, registers of A, B and C, type of the operands
    "m16n8k8.row.col.f32.tf32.tf32.f32": (16, 8, 4, 2, 4, torch.float32),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (16, 8, 2, 1, 4, torch.bfloat16),
    "m16n8k8.row.col.f32.f16.f16.f32": (16, 8, 2, 1, 4, torch.float16),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, 16, 4, 2, 4, torch.bfloat16),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, 16, 4, 2, 4, torch.float16),
    "m8n8k4.row.col.f64.f64.f64.f64": (8, 4, 1, 1, 2, torch.float64),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("flags", [0, emulator.TRUNCATE])
def test_product(name: str, flags: int) -> None:
    rows, K, of_a, of_b, of_c, dtype = PRODUCTS[name]
    bits = 8 * dtype.itemsize
    A, B = torch.randn(rows, K).to(dtype), torch.randn(K, 8).to(dtype)
    C = torch.randn(rows, 8, dtype=torch.float64 if bits == 64 else torch.float32)
    if bits == 32:  # what a tensor core reads of a register
        A, B = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (A, B))
    register, bytes_ = ("b64", 8) if bits == 64 else ("b32", 4)
    per = max(1, 32 // bits)
    a, b = torch.zeros(32, of_a * per, dtype=dtype), torch.zeros(32, of_b * per, dtype=dtype)
    c = torch.zeros(32, of_c, dtype=C.dtype)
    place = [[(0, 0)] * of_c for _ in range(32)]
    for lane in range(32):
        for j in range(of_a):
            for e, (row, column) in enumerate(a_elements(lane, j, K, bits)):
                a[lane, j * per + e] = A[row, column]
        for j in range(of_b):
            for e, (row, column) in enumerate(b_elements(lane, j, bits)):
                b[lane, j * per + e] = B[row, column]
        for j in range(of_c):
            place[lane][j] = (lane // 4 + 8 * (j // 2), 2 * (lane % 4) + j % 2)
            c[lane, j] = C[place[lane][j]]
    if bits == 32:  # the lowest bits are not read
        a, b = ((x.view(torch.int32) | 0x155).view(torch.float32) for x in (a, b))
    out = torch.zeros_like(c)
    body = LANE
    for j, (letter, count) in enumerate((("x", of_a), ("y", of_b), ("z", of_c))):
        body += f"mad.lo.u64 %at, %i, {bytes_ * count}, %a{j};"
        body += "".join(f"ld.global.{register} %{letter}{n}, [%at+{bytes_ * n}];" for n in range(count))
    z = listed("z", of_c)
    body += f"mma.sync.aligned.{name} {z}, {listed('x', of_a)}, {listed('y', of_b)}, {z};"
    body += f"mad.lo.u64 %at, %i, {bytes_ * of_c}, %a3;"
    body += "".join(f"st.global.{register} [%at+{bytes_ * n}], %z{n};" for n in range(of_c))
    registers = REGISTERS + "".join(f".reg .{register} %{letter}<4>;" for letter in "xyz")
    with emulator.unkind(flags):
        emulator.kernel_of(body, 4, registers).run(a, b, c, out)
    exact = A.double() @ B.double() + C.double()
    size = A.double().abs() @ B.double().abs() + C.double().abs()
    for lane in range(32):
        for j in range(of_c):
            wanted, found = float(exact[place[lane][j]]), float(out[lane, j])
            unit = 2.0**-52 if bits == 64 else 2.0**-23
            scale = 4 * float(size[place[lane][j]]) if bits == 64 else max(abs(wanted), 1e-3)
            assert abs(found - wanted) <= unit * scale
            if flags and bits < 64:
                assert abs(found) <= abs(wanted), "cut towards zero"


def test_every_known_one_is_tested() -> None:
    tested = [f"shfl.sync.{mode}.b32" for mode in ("up", "down", "bfly", "idx")]
    tested += [f"redux.sync.{name}" for name in REDUCTIONS] + [f"mma.sync.aligned.{name}" for name in PRODUCTS]
    tested += [
        f"{load}.sync.aligned.m8n8.x{count}{trans}.shared.b16"
        for load in ("ldmatrix", "stmatrix")
        for count in (1, 2, 4)
        for trans in ("", ".trans")
    ]
    known = {opcode for opcode in emulator.known() if re.match("ldmatrix|stmatrix|mma|shfl|redux", opcode)}
    assert known == set(tested)


def test_some_lanes_alone_are_an_error() -> None:
    body = "mov.b32 %s, 0; setp.lt.u32 %p, %l, 5; @%p shfl.sync.idx.b32 %s, %s, 0, 31, -1;"
    with pytest.raises(RuntimeError, match="some lanes of which are elsewhere"):
        emulator.kernel_of(body, 0, REGISTERS + ".reg .pred %p;").run()

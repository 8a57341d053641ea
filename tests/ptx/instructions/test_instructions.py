"""Every instruction that the emulator knows against its definition, under a guard and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx import emulator
from tests.ptx.instructions.definitions import TYPES, Array, Row
from tests.ptx.instructions.rows import ROWS

LANES, ROUNDS = 32, 8
REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
PAIRS = {"f32x2": np.uint64, "bf16x2": np.uint32, "f16x2": np.uint32}


def kind_of(name: str) -> type[np.generic]:
    return PAIRS.get(name) or TYPES[name]


def width(name: str) -> int:
    """Bytes of the register."""
    return 4 if name == "pred" else max(2, np.dtype(kind_of(name)).itemsize)


def operand(name: str, row: Row, generator: np.random.Generator, count: int) -> Array:
    """Random bits, numbers of usual size, and the ends of every range."""
    if name == "pred":
        return generator.integers(0, 2, count).astype(np.bool_)
    kind = kind_of(name)
    bits = generator.integers(0, 256, (count, np.dtype(kind).itemsize), dtype=np.uint8).view(kind)[:, 0].copy()
    if name in ("f32", "f64", "f16"):
        bits[::2] = (generator.standard_normal(bits[::2].size) * 8).astype(kind)
        limits = np.finfo(kind)
        special = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, np.inf, -np.inf, np.nan]
        special += [limits.max, limits.tiny, limits.tiny / 4]
    elif name == "f32x2":
        floats = (generator.standard_normal(2 * count) * 8).astype(np.float32)
        return floats.view(np.uint64)
    elif name == "u32" and row.opcode.startswith(("sh", "bfe")):
        bits[::2] = generator.integers(0, 70, bits[::2].size)
        special = [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 2**32 - 1]
    elif name == "bf16":
        special = [0, 0x8000, 0x3F80, 0x7F80, 0xFF80, 0x7FC0, 1]
    else:
        limits = np.iinfo(kind)
        bits[1::3] = generator.integers(0, 100, bits[1::3].size)
        bits[:7] = np.array([0, 1, limits.max, limits.min, limits.max - 1, 2, 3], dtype=kind)
        return generator.permutation(bits)
    at = generator.choice(count, len(special), replace=False)
    with np.errstate(all="ignore"):
        bits[at] = np.array(special).astype(kind)
    return bits


def stored(values: Array, name: str) -> torch.Tensor:
    """As a kernel loads them: 8-bit types extended to their register, predicates in 32 bits."""
    if name == "pred":
        values = values.astype(np.uint32)
    elif values.dtype.itemsize == 1:
        values = values.astype(np.int16)
    return torch.from_numpy(values.view(f"int{8 * values.dtype.itemsize}")).clone()  # in torch's memory


def text_of(row: Row, guarded: bool) -> tuple[str, str]:
    """Instructions of a thread and its registers: element ``%i`` of each operand, the instruction, the result."""
    names = [*row.operands, row.result]
    registers, body = [".reg .b64 %at;\n.reg .pred %odd;\n.reg .b32 %w;\n.reg .b64 %i;"], ["cvt.u64.u32 %i, %l;"]
    for j, name in enumerate(names):
        kind = "pred" if name == "pred" else REGISTERS[width(name)]
        registers.append(f".reg .{kind} %v{j};")
        body.append(f"mad.lo.u64 %at, %i, {width(name)}, %a{j};")
        if j < len(row.operands) and name == "pred":
            body += ["ld.global.b32 %w, [%at];", f"setp.ne.u32 %v{j}, %w, 0;"]
        elif j < len(row.operands):
            body.append(f"ld.global.{REGISTERS[width(name)]} %v{j}, [%at];")
    last = len(row.operands)
    body.append(f"mov.{'pred' if row.result == 'pred' else REGISTERS[width(row.result)]} %v{last}, 0;")
    body += ["and.b32 %w, %l, 1;", "setp.eq.u32 %odd, %w, 1;"]
    body.append(
        f"{'@%odd ' if guarded else ''}{row.opcode.split('(')[0]} %v{last}, {', '.join(f'%v{j}' for j in range(last))};"
    )
    if row.result == "pred":
        body += [f"selp.b32 %w, 1, 0, %v{last};", "st.global.b32 [%at], %w;"]
    else:
        body.append(f"st.global.{REGISTERS[width(row.result)]} [%at], %v{last};")
    return "\n".join(body), "\n".join(registers)


def executed(row: Row, operands: list[Array], guarded: bool) -> Array:
    count = len(operands[0])
    given = [stored(values, name) for values, name in zip(operands, row.operands, strict=True)]
    out = torch.zeros(count * width(row.result), dtype=torch.uint8)
    body, registers = text_of(row, guarded)
    kernel = emulator.kernel_of(body, len(given) + 1, registers)
    kernel.run(*given, out, threads=count)
    raw = out.numpy()
    if row.result == "pred":
        return raw.view(np.uint32) != 0
    kind = kind_of(row.result)
    if np.dtype(kind).itemsize == 1:
        extended = raw.view(np.int16 if row.result[0] == "s" else np.uint16)
        assert (extended == extended.astype(kind)).all(), "extended otherwise than by the type's sign"
        return extended.astype(kind)
    return raw.view(kind)


def floats_of(values: Array, name: str) -> Array:
    if name == "f32x2":
        return values.view(np.float32)
    if name in ("bf16", "bf16x2"):
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.view(np.float16) if name == "f16x2" else values


def assert_same(found: Array, wanted: Array, row: Row, operands: list[Array]) -> None:
    if not row.ulps:
        found, wanted = floats_of(found, row.result), floats_of(wanted.astype(kind_of(row.result)), row.result)
        same = found == wanted
        if found.dtype.kind == "f":
            same = (np.isnan(found) & np.isnan(wanted)) | (same & (np.signbit(found) == np.signbit(wanted)))
    else:
        with np.errstate(all="ignore"):
            unit = np.maximum(np.spacing(np.abs(wanted).astype(np.float32)), np.finfo(np.float32).smallest_subnormal)
            allowed = row.ulps * unit.astype(np.float64)
            if row.opcode.startswith("lg2"):
                allowed = np.where((operands[0] > 0.5) & (operands[0] < 2), 2**-22.5, allowed)
            near = np.abs(found.astype(np.float64) - wanted) <= allowed
            tiny = np.abs(wanted) < np.finfo(np.float32).tiny  # flushed, where the instruction does
            past = np.abs(wanted) >= np.finfo(np.float32).max
            same = near | (np.isnan(found) & np.isnan(wanted)) | (found == wanted.astype(np.float32))
            same |= (tiny & (np.abs(found) < 2 * np.finfo(np.float32).tiny)) | (past & (np.abs(found) >= 3e38))
    bad = np.flatnonzero(~same)
    examples = [(*(o[i] for o in operands if len(o) == len(same)), found[i], wanted[i]) for i in bad[:4]]
    assert not len(bad), f"{len(bad)} of {len(same)}, operands, found and defined: {examples}"


@pytest.mark.parametrize("opcode", sorted(ROWS))
def test_instruction(opcode: str) -> None:
    row = ROWS[opcode]
    generator = np.random.default_rng(len(opcode))
    operands = [operand(name, row, generator, LANES * ROUNDS) for name in row.operands]
    with np.errstate(all="ignore"):
        wanted = row.definition(*operands)
    for flags in (0, emulator.EVERYTHING) if row.ulps else (0,):
        with emulator.unkind(flags):
            assert_same(executed(row, operands, guarded=False), wanted, row, operands)
    guarded = executed(row, operands, guarded=True)
    assert not guarded[::2].astype(np.bool_).any(), "written where the guard does not hold"


def test_every_known_instruction_is_in_the_table() -> None:
    elsewhere = ("ldmatrix", "stmatrix", "mma", "shfl", "redux")  # test_warp_wide.py
    known = {opcode for opcode in emulator.known() if not opcode.startswith(elsewhere)}
    assert known == set(ROWS)


def test_noise_reaches_what_is_allowed() -> None:
    """An approximation is off by something, in both directions."""
    row, values = ROWS["rcp.approx.f32"], np.linspace(1, 2, 256, dtype=np.float32)
    with emulator.unkind(emulator.NOISE):
        off = executed(row, [values], guarded=False).astype(np.float64) - 1 / values.astype(np.float64)
    exact = (1 / values).astype(np.float64) - 1 / values.astype(np.float64)
    assert (off > exact).any()
    assert (off < exact).any()


@pytest.mark.parametrize("constant", ["0f40490FDB", "3", "-3", "0x10"])
def test_constants(constant: str) -> None:
    out = torch.zeros(LANES, dtype=torch.int32)
    registers = ".reg .b32 %v; .reg .b64 %at; .reg .b64 %i;"
    body = f"mov.b32 %v, {constant}; cvt.u64.u32 %i, %l; mad.lo.u64 %at, %i, 4, %a0; st.global.b32 [%at], %v;"
    emulator.kernel_of(body, 1, registers).run(out)
    wanted: Any = {"0f40490FDB": 0x40490FDB, "0x10": 16}.get(constant) or int(constant)
    assert (out == wanted).all()


def test_packing() -> None:
    """mov of several registers: the first has the lowest bits."""
    out = torch.zeros(3, dtype=torch.int64)
    registers = ".reg .b32 %w<4>; .reg .b16 %h<4>; .reg .b64 %v; .reg .pred %p;"
    body = """
    setp.eq.u32 %p, %l, 0;
    mov.b32 %w0, 0x11112222; mov.b32 %w1, 0x33334444;
    mov.b64 %v, {%w0, %w1};
    @%p st.global.b64 [%a0], %v;
    mov.b64 {%w2, %w3}, %v;
    mov.b64 %v, {%w3, %w2};
    @%p st.global.b64 [%a0+8], %v;
    mov.b32 {%h0, %h1}, %w0;
    mov.b64 %v, {%h0, %h1, %h1, %h0};
    @%p st.global.b64 [%a0+16], %v;
    """
    emulator.kernel_of(body, 1, registers).run(out)
    assert [hex(int(v)) for v in out] == ["0x3333444411112222", "0x1111222233334444", "0x2222111111112222"]


def test_a_loop_that_lanes_leave_at_their_own_times() -> None:
    """Lane i goes around i times, and all meet again after."""
    out = torch.zeros(2 * LANES, dtype=torch.int32)
    registers = ".reg .b32 %n; .reg .b32 %s; .reg .b64 %i; .reg .b64 %at; .reg .pred %p;"
    body = """
    mov.b32 %n, 0; mov.b32 %s, 0;
    $loop:
    setp.ge.u32 %p, %n, %l;
    @%p bra $done;
    add.s32 %n, %n, 1;
    add.s32 %s, %s, %n;
    bra.uni $loop;
    $done:
    shfl.sync.idx.b32 %n, %s, 31, 31, -1;
    cvt.u64.u32 %i, %l; mad.lo.u64 %at, %i, 8, %a0;
    st.global.v2.b32 [%at], {%s, %n};
    """
    emulator.kernel_of(body, 1, registers).run(out)
    own, last = out.view(LANES, 2).unbind(1)
    assert own.tolist() == [lane * (lane + 1) // 2 for lane in range(LANES)]
    assert (last == 31 * 32 // 2).all()

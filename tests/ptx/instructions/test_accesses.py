"""Loads, stores, atomics and asynchronous copies against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.ptx import emulator

COMMON = ".reg .b64 %i; .reg .b64 %at; .reg .b32 %s; .reg .b32 %n; .reg .pred %p;"
TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("elements", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("modifiers", ["", ".L1::evict_last"])
def test_load_and_store(space: str, elements: int, bits: int, modifiers: str) -> None:
    """A lane's elements lie side by side."""
    if elements * bits > 128:
        pytest.skip("no vector of more than 128 bits")
    if modifiers and space == "shared":
        pytest.skip("no cache before shared memory")
    size, register = elements * bits // 8, max(bits, 16)
    vector = f".v{elements}" if elements > 1 else ""
    given = torch.randint(0, 100, (32 * size // (bits // 8),)).to(TYPES[bits // 8])
    out = torch.zeros_like(given)
    names = "{" + ", ".join(f"%v{j}" for j in range(elements)) + "}"
    names = names if elements > 1 else "%v0"
    body = f"cvt.u64.u32 %i, %l; mad.lo.u64 %at, %i, {size}, %a0; mul.lo.u32 %s, %l, {size};"
    body += f"ld.global{modifiers}{vector}.b{bits} {names}, [%at];"
    if space == "shared":
        body += f"st.shared{vector}.b{bits} [%s], {names};"
        body += f"ld.shared{vector}.b{bits} {names}, [%s];"
    body += f"mad.lo.u64 %at, %i, {size}, %a1; st.global{vector}.b{bits} [%at], {names};"
    kernel = emulator.kernel_of(body, 2, COMMON + f".reg .b{register} %v<4>;")
    kernel.run(given, out, shared=32 * size)
    assert torch.equal(out, given)


@pytest.mark.parametrize(("kind", "wanted"), [("s8", -2), ("u8", 254), ("s16", -2), ("u16", 65534)])
def test_narrow_loads_are_extended(kind: str, wanted: int) -> None:
    given = torch.tensor([-2], dtype=torch.int8 if kind[1:] == "8" else torch.int16)
    out = torch.zeros(1, dtype=torch.int32)
    body = f"setp.eq.u32 %p, %l, 0; ld.global.{kind} %s, [%a0]; @%p st.global.b32 [%a1], %s;"
    emulator.kernel_of(body, 2, COMMON).run(given, out)
    assert out.item() == wanted


def test_parameters() -> None:
    out = torch.zeros(3, dtype=torch.int64)
    text = """.version 8.0
    .target sm_80
    .visible .entry kernel(.param .u64 .ptr .global .align 1 to, .param .u32 a, .param .u64 b)
    {
    .reg .b64 %to; .reg .b32 %a; .reg .b64 %b; .reg .b64 %wide;
    ld.param.u64 %to, [to]; ld.param.u32 %a, [a]; ld.param.u64 %b, [b+0];
    cvt.u64.u32 %wide, %a;
    st.global.b64 [%to], %wide; st.global.b64 [%to+8], %b;
    ret;
    }"""
    emulator.Kernel(text).run(out, 7, 2**40 + 1)
    assert out.tolist() == [7, 2**40 + 1, 0]


@pytest.mark.parametrize(
    ("name", "start", "wanted"), [("or.b32", 0, 31), ("add.u32", 5, 5 + sum(range(32))), ("max.u32", 7, 31)]
)
@pytest.mark.parametrize("order", ["acq_rel", "relaxed"])
def test_atomics(name: str, start: int, wanted: int, order: str) -> None:
    """The old value comes back: of the sum, each of its steps once."""
    x = torch.tensor([start], dtype=torch.int32)
    old = torch.zeros(32, dtype=torch.int32)
    body = f"""
    atom.global.gpu.{order}.{name} %s, [%a0], %l;
    cvt.u64.u32 %i, %l; mad.lo.u64 %at, %i, 4, %a1; st.global.b32 [%at], %s;"""
    emulator.kernel_of(body, 2, COMMON).run(x, old)
    assert x.item() == wanted
    assert start in old.tolist()


def test_reduction_without_a_result() -> None:
    x = torch.zeros(1, dtype=torch.int32)
    emulator.kernel_of("red.global.gpu.relaxed.or.b32 [%a0], %l;", 1, COMMON).run(x)
    assert x.item() == 31


def copied(size: int, read: str, wait: str) -> torch.Tensor:
    """32 copies of ``size`` bytes into shared memory, and what is read there after ``wait``."""
    given, out = torch.arange(32 * size // 4, dtype=torch.int32), torch.zeros(32 * size // 4, dtype=torch.int32)
    load = "".join(f"ld.shared.b32 %n, [%s+{4 * j}]; st.global.b32 [%at+{4 * j}], %n;" for j in range(size // 4))
    cache = "cg" if size == 16 else "ca"
    body = f"""
    cvt.u64.u32 %i, %l; mad.lo.u64 %at, %i, {size}, %a0; mul.lo.u32 %s, %l, {size};
    and.b32 %n, %l, 1; mul.lo.u32 %n, %n, {size};
    cp.async.{cache}.shared.global [%s], [%at], {size}{read};
    cp.async.commit_group;
    {wait}
    mad.lo.u64 %at, %i, {size}, %a1; {load}"""
    emulator.kernel_of(body, 2, COMMON).run(given, out, shared=32 * size)
    return out.view(32, -1)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_asynchronous_copies(size: int, wait: str) -> None:
    given = torch.arange(32 * size // 4, dtype=torch.int32).view(32, -1)
    assert torch.equal(copied(size, "", wait), given)
    given[::2] = 0  # lanes that read nothing
    assert torch.equal(copied(size, ", %n", wait), given)


def test_a_copy_that_was_not_waited_for_has_not_landed() -> None:
    assert copied(4, "", "").view(torch.float32).isnan().all()
    assert copied(4, "", "cp.async.wait_group 1;").view(torch.float32).isnan().all()

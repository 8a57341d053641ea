"""Faults that are planted are reported; what only looks like one is not."""

from __future__ import annotations

import pytest
import torch

from tests.ptx import emulator

pytest.importorskip("triton")

REGISTERS = ".reg .b32 %v; .reg .b32 %w; .reg .b64 %i; .reg .b64 %at; .reg .pred %p;"
# Every thread puts its number into shared memory and takes what the thread 32 further has put there.
EXCHANGE = """
mul.lo.u32 %w, %l, 4;
st.shared.b32 [%w], %l;
{between}
xor.b32 %w, %w, 128;
ld.shared.b32 %v, [%w];
cvt.u64.u32 %i, %l; mad.lo.u64 %at, %i, 4, %a0;
st.global.b32 [%at], %v;
"""


def exchange(between: str) -> torch.Tensor:
    out = torch.zeros(64, dtype=torch.int32)
    emulator.kernel_of(EXCHANGE.format(between=between), 1, REGISTERS).run(out, threads=64, shared=256)
    return out


def test_a_barrier_orders_warps() -> None:
    assert exchange("bar.sync 0;").tolist() == [i ^ 32 for i in range(64)]


def test_without_one_is_a_race() -> None:
    with pytest.raises(RuntimeError, match="read after another warp's write"):
        exchange("")


def test_write_after_read_is_a_race() -> None:
    body = """
    mul.lo.u32 %w, %l, 4; st.shared.b32 [%w], %l;
    bar.sync 0;
    xor.b32 %w, %w, 128; ld.shared.b32 %v, [%w];
    xor.b32 %w, %w, 128; add.s32 %v, %v, 7; st.shared.b32 [%w], %v;
    """
    with pytest.raises(RuntimeError, match=r"write after another warp's read|read after another warp's write"):
        emulator.kernel_of(body, 0, REGISTERS).run(threads=64, shared=256)


def test_the_same_value_written_by_all_is_none() -> None:
    body = "mov.b32 %w, 0; mov.b32 %v, 5; st.shared.b32 [%w], %v;"
    emulator.kernel_of(body, 0, REGISTERS).run(threads=64, shared=256)


def test_another_value_is_one() -> None:
    body = "mov.b32 %w, 0; st.shared.b32 [%w], %l;"
    with pytest.raises(RuntimeError, match="write over another warp's write"):
        emulator.kernel_of(body, 0, REGISTERS).run(threads=64, shared=256)


def test_blocks_race_in_global_memory() -> None:
    from tests.ptx import planted

    for seed in range(4):  # in either order, one of which changes nothing at first
        with (
            emulator.unkind(emulator.EVERYTHING, seed),
            pytest.raises(RuntimeError, match="write over what another block of the launch wrote"),
        ):
            planted.every_program_writes_the_same_place[(2,)](torch.zeros(1))
    planted.every_program_writes_the_same_place[(1,)](torch.zeros(1))


def test_blocks_do_not_race_by_atomics() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    body = """
    mov.u32 %w, %ctaid.x; mov.b32 %v, 1; shl.b32 %v, %v, %w;
    atom.global.gpu.acq_rel.or.b32 %w, [%a0], %v;
    """
    emulator.kernel_of(body, 1, REGISTERS).run(out, blocks=5)
    assert out.item() == 0b11111


@pytest.mark.parametrize("n", [100, 128])
def test_over_read_is_out_of_bounds(n: int) -> None:
    from tests.ptx import planted

    x, y = torch.randn(n), torch.zeros(n)
    if n == 128:
        planted.over_read[(1,)](x, y, n, BLOCK=128)
        assert torch.equal(x, y)
    else:
        with pytest.raises(RuntimeError, match="out of bounds"):
            planted.over_read[(1,)](x, y, n, BLOCK=128)


def test_memory_that_was_freed_is_out_of_bounds() -> None:
    body = "ld.global.b32 %v, [%a0];"
    kernel = emulator.kernel_of(body, 1, REGISTERS)
    x = torch.zeros(4)
    address = x.data_ptr()
    kernel.run(address)
    del x
    with pytest.raises(RuntimeError, match="out of bounds"):
        kernel.run(address)


def test_memory_that_torch_does_not_have_is_out_of_bounds() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        emulator.kernel_of("ld.global.b32 %v, [%a0];", 1, REGISTERS).run(0)


def test_shared_memory_has_an_end() -> None:
    body = "mov.b32 %w, {at}; ld.shared.b32 %v, [%w];"
    emulator.kernel_of(body.format(at=252), 0, REGISTERS).run(shared=256)
    with pytest.raises(RuntimeError, match="shared memory, out of bounds"):
        emulator.kernel_of(body.format(at=256), 0, REGISTERS).run(shared=256)


def test_misaligned() -> None:
    with pytest.raises(RuntimeError, match="misaligned"):
        emulator.kernel_of("ld.global.b64 %at, [%a0+4];", 1, REGISTERS).run(torch.zeros(8))


@pytest.mark.parametrize("n", [3, 4, 6, 8])
def test_the_hint_that_triton_spreads(n: int) -> None:
    """As the kernels of the Stiefel operators had it, under a Triton that spreads it."""
    import triton

    from tests.ptx import planted

    # as far from any other memory as a column of a factor is from the end of its storage
    table, x = torch.tensor([n, 0]), torch.zeros(n)
    if tuple(map(int, triton.__version__.split(".")[:2])) == (3, 9) and n % 4:
        with pytest.raises(RuntimeError, match="out of bounds"):
            planted.hint_on_a_helper_s_result[(1,)](table, x, BLOCK=512)
    else:
        planted.hint_on_a_helper_s_result[(1,)](table, x, BLOCK=512)
        assert (x == 1).all()


def test_a_kernel_without_fault() -> None:
    from tests.ptx import planted

    x, y = torch.randn(1000), torch.empty(1)
    planted.sum_of[(1,)](x, y, 1000, BLOCK=1024)
    torch.testing.assert_close(y[0], x.sum())


def test_what_was_never_written_is_nan() -> None:
    """New tensors, registers and shared memory."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty(1000, dtype=torch.bfloat16).isnan().all()
    out = torch.zeros(2)
    body = "mov.b32 %w, 0; st.global.b32 [%a0], %v; ld.shared.b32 %v, [%w]; st.global.b32 [%a0+4], %v;"
    emulator.kernel_of(body, 1, REGISTERS).run(out, shared=256)
    assert out.isnan().all()


def test_a_kernel_s_scratch_shows_as_nan() -> None:
    from tests.ptx import planted

    x, y = torch.empty(1000), torch.zeros(1)
    x[:999] = 1.0
    planted.sum_of[(1,)](x, y, 1000, BLOCK=1024)
    assert y.isnan().all()


@pytest.mark.parametrize(
    "statement",
    [
        "tanh.approx.f32 %v, %v;",
        "add.rz.f32 %v, %v, %v;",
        "ld.global.mystery.b32 %v, [%a0];",
        "ld.generic.b32 %v, [%a0];",
        "bar.sync 1;",
        "bar.arrive 0, 64;",
        "add.s32 %v, %v;",
        "add.s32 %v, %at, %v;",
        "add.s32 %v, %nowhere, %v;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%v}, {%v}, {%v}, {%v};",
        "wgmma.fence.sync.aligned;",
        "bra $nowhere;",
    ],
)
def test_what_is_not_known_is_an_error(statement: str) -> None:
    with pytest.raises(RuntimeError, match=r"known|no such label|kind"):
        emulator.kernel_of(statement, 1, REGISTERS)


def test_a_barrier_that_lanes_are_missing_at() -> None:
    with pytest.raises(RuntimeError, match="not every lane"):
        emulator.kernel_of("setp.lt.u32 %p, %l, 7; @%p bar.sync 0;", 0, REGISTERS).run()


def test_a_barrier_that_a_warp_is_missing_at() -> None:
    body = "setp.ge.u32 %p, %l, 32; @%p bra $end; bar.sync 0;\n$end:"
    with pytest.raises(RuntimeError, match="others have ended without"):
        emulator.kernel_of(body, 0, REGISTERS).run(threads=64)

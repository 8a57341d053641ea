"""What tensor cores cut off and the interpreter does not: operands of tf32 products are rounded before."""

from __future__ import annotations

import pytest
import torch

from tests.ptx import emulator

pytest.importorskip("triton")


def test_the_core_of_a_half_layer_is_rounded_and_not_cut_off() -> None:
    """Cut off, every element of S is smaller by 2⁻¹¹ in the mean, and so is the whole adapter."""
    T, m, n, r = 64, 96, 64, 16
    x, U, S, Vt = (torch.rand(shape) for shape in ((T, n), (m, r), (r, r), (r, n)))
    wanted = x.half().double() @ Vt.half().double().mT @ S.double().mT @ U.half().double().mT / 1e3
    y = torch.zeros(T, m, dtype=torch.float16)
    with emulator.unkind(emulator.RACES):
        emulator.operators()["adapter_forward_"](y, x.half(), U, S, Vt, 1e-3, 0.0, None)
    bias = float(((y.double() - wanted) / wanted).mean())
    # r² elements of S, T r of A and T r of P, each rounded to 2⁻¹¹: a mean over as many has a few thousandths of it
    assert abs(bias) < 2.0**-11 / 8

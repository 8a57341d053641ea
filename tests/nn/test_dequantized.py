"""Whole adapted layers on real quantized bases against the weight those bases dequantize to, forward and backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stella_kernels import StellaLinear
from stella_kernels.reference import adapter

N, M, R, P = 64, 128, 4, 0.3  # features are multiples of the packages' blocks of 64
# a base, and its weight (m, n) in float64
Quantized = tuple[nn.Module, Tensor]


def torchao(dtype: torch.dtype, settings: Callable[[object], object]) -> Quantized:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(nn.Linear(N, M, dtype=dtype)).requires_grad_(False)
    quantization.quantize_(holder, settings(quantization))
    return holder[0], holder[0].weight.dequantize().double()


def int8(dtype: torch.dtype) -> Quantized:
    return torchao(dtype, lambda q: q.Int8WeightOnlyConfig())


def int4_groups(dtype: torch.dtype) -> Quantized:
    return torchao(
        dtype,
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.granularity.PerGroup(32)),
    )


def bitsandbytes(dtype: torch.dtype, build: Callable[[object], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own, while it is imported
        package = pytest.importorskip("bitsandbytes")
    base = build(package.nn)
    base.load_state_dict(nn.Linear(N, M).state_dict())
    base.to("cpu")  # quantizes
    base(torch.zeros(1, N, dtype=dtype))  # an 8-bit layer settles its state in its first call
    return base


def four_bit(dtype: torch.dtype, kind: str) -> Quantized:
    base = bitsandbytes(dtype, lambda nn: nn.Linear4bit(N, M, quant_type=kind, compute_dtype=dtype))
    from bitsandbytes.functional import dequantize_4bit

    return base, dequantize_4bit(base.weight.data, base.weight.quant_state).double().reshape(M, N)


def nf4(dtype: torch.dtype) -> Quantized:
    return four_bit(dtype, "nf4")


def fp4(dtype: torch.dtype) -> Quantized:
    return four_bit(dtype, "fp4")


def eight_bit(dtype: torch.dtype) -> Quantized:
    base = bitsandbytes(dtype, lambda nn: nn.Linear8bitLt(N, M, has_fp16_weights=False))
    rows, scales = (
        own if own is not None else kept
        for own, kept in ((base.weight.CB, base.state.CB), (base.weight.SCB, base.state.SCB))
    )
    return base, rows.double() * scales.double().unsqueeze(1) / 127


def stella(base: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    layer = StellaLinear(base, r=R, alpha=2 * R, dropout=P)
    return layer, [layer.U, layer.S, layer.Vt]


def peft(base: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from stella_kernels.peft import StellaConfig

    model = get_peft_model(
        nn.Sequential(base), StellaConfig(r=R, lora_alpha=2 * R, lora_dropout=P, target_modules=["0"])
    )
    return model, list(model.base_model.model[0].factors("default"))


@pytest.mark.parametrize("adapt", [stella, peft])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [int8, int4_groups, nf4, fp4, eight_bit])
def test_whole_layer(
    build: Callable[[torch.dtype], Quantized],
    dtype: torch.dtype,
    adapt: Callable[[nn.Module], tuple[nn.Module, list[Tensor]]],
) -> None:
    base, W = build(dtype)
    bias = base.bias.detach().double()
    assert base.weight.element_size() == 1 or type(base.weight) is not nn.Parameter
    model, factors = adapt(base)
    model.train()
    nn.init.normal_(factors[1])
    assert all(t.dtype == torch.float32 for t in factors)
    x = torch.randn(2, 5, N).to(dtype).requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    assert y.dtype == dtype
    grad_y = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, [x, *factors], grad_y))

    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    exact = [t.detach().double() for t in factors]
    rows, flat = x.detach().double().reshape(-1, N), grad_y.double().reshape(-1, M)
    term, A = adapter.adapter_forward(rows, *exact, 2.0, P, seed)
    parts = adapter.adapter_backward(flat, rows, *exact, 2.0, P, seed)
    base_y, base_x = rows @ W.mT + bias, flat @ W
    wanted = (base_y + term, base_x + parts.x, parts.U, parts.S, parts.Vt)
    sizes = [float(base_y.norm() + term.norm()), float(base_x.norm() + parts.x.norm())]
    # an r x r sum over T may cancel: relative to its factors, Q = s Y'U and A
    sizes += [float(parts.U.norm()), float((2.0 * flat @ exact[0]).norm() * A.norm()), float(parts.Vt.norm())]
    # seven values are rounded to dtype on the way, by cond(S) more at most; the base rounds its weight and its sum;
    # float32 sums of at most 128 terms in three products
    bound = 2 * 9 * torch.finfo(dtype).eps + 3 * 128 * torch.finfo(torch.float32).eps
    for value, right, size in zip(found, wanted, sizes, strict=True):
        assert float((value.detach().double().reshape(right.shape) - right).norm()) <= bound * size
    assert [g.dtype for g in found[1:]] == [dtype] + [torch.float32] * 3

"""Adapters on quantized bases of the real packages, on the CPU: torchao weight-only and bitsandbytes 4 and 8 bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stella_kernels import StellaLinear
from stella_kernels.reference import adapter

N, M, R = 64, 128, 4  # features are multiples of the packages' blocks of 64


def torchao_int8() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(nn.Linear(N, M)).requires_grad_(False)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    assert type(holder[0].weight) is not nn.Parameter
    return holder[0]


def _bitsandbytes(build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own, while it is imported
        package = pytest.importorskip("bitsandbytes")
    base = build(package.nn)
    base.load_state_dict(nn.Linear(N, M).state_dict())
    return base.to("cpu")  # quantizes


def bitsandbytes_4bit() -> nn.Module:
    return _bitsandbytes(lambda package: package.Linear4bit(N, M, quant_type="nf4", compute_dtype=torch.float32))


def bitsandbytes_8bit() -> nn.Module:
    return _bitsandbytes(lambda package: package.Linear8bitLt(N, M, has_fp16_weights=False))


def stella(base: nn.Module, dropout: float) -> tuple[nn.Module, list[Tensor]]:
    layer = StellaLinear(base, r=R, alpha=2 * R, dropout=dropout)
    return layer, [layer.U, layer.S, layer.Vt]


def peft(base: nn.Module, dropout: float) -> tuple[nn.Module, list[Tensor]]:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from stella_kernels.peft import StellaConfig

    config = StellaConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config)
    return model, list(model.base_model.model[0].factors("default"))


@pytest.mark.parametrize("adapt", [stella, peft])
@pytest.mark.parametrize("build", [torchao_int8, bitsandbytes_4bit, bitsandbytes_8bit])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_quantized_base(
    build: Callable[[], nn.Module],
    adapt: Callable[[nn.Module, float], tuple[nn.Module, list[Tensor]]],
    dropout: float,
) -> None:
    """The adapter's part of the output and of every gradient, whatever the base makes of its weight."""
    base = build()
    alone = copy.deepcopy(base)
    model, factors = adapt(base, dropout)
    model.train()
    with torch.no_grad():
        factors[1].copy_(torch.randn_like(factors[1]))
    x, grad_y = torch.randn(2, 5, N), torch.randn(2, 5, M)
    inputs, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(inputs)
    grads = torch.autograd.grad(y, [inputs, *factors], grad_y)
    y_base = alone(own)
    (grad_base,) = torch.autograd.grad(y_base, own, grad_y)

    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64) if dropout else None
    exact = [t.detach().double() for t in factors]
    rows, flat = x.double().reshape(-1, N), grad_y.double().reshape(-1, M)
    term, _ = adapter.adapter_forward(rows, *exact, 2.0, dropout, seed)
    wanted = adapter.adapter_backward(flat, rows, *exact, 2.0, dropout, seed)
    # float32: products of at most 128 terms and ten roundings, each of a value no larger than a few norms
    bound = 200 * torch.finfo(torch.float32).eps
    found = {
        "y": (y.reshape(-1, M) - y_base.reshape(-1, M), term),
        "x": (grads[0].reshape(-1, N) - grad_base.reshape(-1, N), wanted.x),
        "U": (grads[1], wanted.U),
        "S": (grads[2], wanted.S),
        "Vt": (grads[3], wanted.Vt),
    }
    for name, (value, exact_value) in found.items():
        size = float(exact_value.norm()) + (float(y_base.norm()) + float(grad_base.norm()) if name in "xy" else 0.0)
        assert float((value.double() - exact_value).norm()) <= bound * size, name
    assert all(p.grad is None for p in alone.parameters())

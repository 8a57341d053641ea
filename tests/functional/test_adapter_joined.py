"""Several adapters of one layer that differ in rank, dropout and dtype, inside autocast and outside; mixed batches."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("peft")

from peft import get_peft_model
from torch import Tensor, nn

from stella_kernels.functional import join_adapters
from stella_kernels.peft import StellaConfig

T, N, M = 7, 12, 9
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("default", "second")


def two_adapters(dtypes: tuple[torch.dtype, torch.dtype], dropouts: tuple[float, float] = (0.0, 0.0)):
    """A model of one layer and the layer: rank 2 and a full S, rank 3 and a diagonal one; both active and trained."""
    first, second = (StellaConfig(target_modules=["0"], lora_dropout=p) for p in dropouts)
    first.r, first.lora_alpha = 2, 6
    second.r, second.lora_alpha, second.stella_diag_s = 3, 5, True
    model = get_peft_model(nn.Sequential(nn.Linear(N, M)), first)
    model.add_adapter("second", second)
    model.base_model.set_adapter(list(NAMES))
    layer = model.base_model.model[0]
    for name, dtype in zip(NAMES, dtypes, strict=True):
        nn.init.normal_(layer.stella_S[name].weight)
        for kind in (layer.stella_U, layer.stella_S, layer.stella_Vt):
            kind[name].weight = nn.Parameter(kind[name].weight.detach().to(dtype))
    return model, layer


def written_out(layer, x: Tensor) -> Tensor:
    """float64, of the factors as they are stored."""
    total = nn.functional.linear(x.double(), layer.base_layer.weight.double(), layer.base_layer.bias.double())
    for name in NAMES:
        U, S, Vt = (t.double() for t in layer.factors(name))
        core = S.diag() if S.dim() == 1 else S
        total = total + layer.scaling[name] * x.double() @ Vt.mT @ core.mT @ U.mT
    return total


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_any_two_dtypes(first: torch.dtype, second: torch.dtype, autocast: torch.dtype | None) -> None:
    """The factors are taken as they are stored: in float32 at least, no product is rounded to a factor's dtype."""
    model, layer = two_adapters((first, second))
    x = torch.randn(4, T, N, requires_grad=True)
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        y = model(x)
    assert y.dtype == (autocast or torch.float32)
    leaves = [x, *layer.factors("default"), *layer.factors("second")]
    grad_y = torch.randn(4, T, M)
    found = torch.autograd.grad(y, leaves, grad_y.to(y.dtype))
    wanted = torch.autograd.grad(written_out(layer, x), leaves, grad_y.to(y.dtype).double())
    # at most ten values on the way are rounded to y's dtype, of norms that exceed the result's by less than 3
    # (cond of a random S aside); float32 sums of at most 28 terms; a gradient is rounded to its factor's dtype once
    bound = 30 * torch.finfo(y.dtype).eps + 3 * 28 * torch.finfo(torch.float32).eps
    exact_y = written_out(layer, x)
    assert float((y.double() - exact_y).detach().norm()) <= bound * float(exact_y.detach().norm())
    for leaf, a, b in zip(leaves, found, wanted, strict=True):
        assert a.dtype == leaf.dtype
        own = bound + torch.finfo(leaf.dtype).eps
        assert float((a.double() - b.double()).norm()) <= own * float(b.double().norm()) + 1e-30


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_core_is_not_rounded_to_half_precision(dtype: torch.dtype, diagonal: bool) -> None:
    S = torch.randn(3).to(dtype) if diagonal else torch.randn(3, 3).to(dtype)
    adapter = (torch.randn(M, 3).to(dtype), S, torch.randn(3, N).to(dtype), 1 / 3)
    _, core, _, scale = join_adapters([adapter, adapter])
    assert core.dtype == torch.float32
    assert scale == 1.0
    exact = S.double() / 3
    found = core[:3] if diagonal else core[:3, :3]
    # one rounding of the product, one of the scale
    assert float((found.double() - exact).norm()) <= torch.finfo(torch.float32).eps * float(exact.norm())


@pytest.mark.parametrize("dropouts", [(0.3, 0.3), (0.3, 0.5), (0.0, 0.5)])
def test_dropout_of_several_adapters_repeats_under_one_seed(dropouts: tuple[float, float]) -> None:
    """Together where the probabilities are equal, one after the other where they are not."""
    model, layer = two_adapters((torch.float32, torch.float32), dropouts)
    model.train()
    leaves = [*layer.factors("default"), *layer.factors("second")]
    x, runs = torch.randn(50, N), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = model(x)
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])
    mean = torch.stack([model(x).detach() for _ in range(400)])
    still = model.eval()(x).detach()
    # within 6 standard errors of the undropped output, everywhere
    assert bool(((mean.mean(0) - still).abs() <= 6 * mean.std(0) / 20 + 1e-6).all())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_mixed_batch_is_each_row_by_its_own_adapter(autocast: torch.dtype | None) -> None:
    model, layer = two_adapters((torch.float32, torch.float32))
    model.eval()
    x, names = torch.randn(4, T, N), ["second", "__base__", "default", "second"]
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        y = model(x, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    wanted = model(x[row : row + 1])
            else:
                model.set_adapter(name)
                wanted = model(x[row : row + 1])
            assert y.dtype == wanted.dtype
            # one rounding to y's dtype more or less, of the base's output or of the sum
            difference = float((y[row] - wanted[0]).double().detach().norm())
            assert difference <= 4 * torch.finfo(y.dtype).eps * float(wanted.double().detach().norm())
    model.set_adapter("default")
    layer.requires_grad_(True)
    model(x, adapter_names=names).sum().backward()
    for name in NAMES:
        assert all(w.grad is not None and bool(w.grad.any()) for w in layer.factors(name))

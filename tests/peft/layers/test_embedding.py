"""What torch's embeddings have of their own: a padding, gradients by frequency, a norm, a scale."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.peft import StellaConfig, reduce_rank
from stella_kernels.serving import import_adapter
from tests.peft.layers.bases import EXACT, dense, one_layer, update
from tests.peft.models import difference, orthonormality

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[2, 5, 5, 2, 2], [5, 5, 1, 12, 2]])


@pytest.mark.parametrize("way", ["fused", "polar", "exp_map", "qr", "cayley", "quotient"])
@pytest.mark.parametrize(
    ("padding", "start"), [(0, "rando"), (1, "svd_major"), (12, "zero"), (1, "pseudo_zero"), (2, False), (-1, "rando")]
)
def test_the_padding_starts_and_stays_as_it_is(start, way, padding):
    base = nn.Embedding(13, 7, padding_idx=padding, dtype=torch.float64)
    padding = base.padding_idx  # torch counts one below 0 from the end
    ids = torch.where(IDS == 2, padding, IDS)
    nn.init.normal_(base.weight)  # with a row of the padding that a checkpoint filled
    model, layer = one_layer(copy.deepcopy(base), init_lora_weights=start)
    assert torch.equal(update(layer)[:, padding], torch.zeros(7))
    # U and V are orthonormal all the same: QRs of 12 rows, sums of 12 products
    assert orthonormality(model) < EXACT
    before = [factor.detach().clone() for factor in layer.factors("default")]
    if way == "fused":
        optimizer = StellaAdamW(model, lr=1e-2, grad_scaling=7)
    else:
        optimizer = torch.optim.AdamW(layer.factors("default"), lr=1e-2, weight_decay=0.0)
        geometry = {"geometry": "quotient"} if way == "quotient" else {"retraction": way}
        attach(optimizer, model, grad_scaling=7, **geometry)
    for _ in range(6):
        optimizer.zero_grad()
        (model(ids) - 1).square().sum().backward()
        optimizer.step()
    assert all(difference(new.detach(), old) > 1e-3 for new, old in zip(layer.factors("default"), before, strict=True))
    assert orthonormality(model) < 10 * EXACT
    # a retraction makes multiples and sums of rows
    assert torch.equal(layer.factors("default")[2][:, padding], torch.zeros(3))
    assert torch.equal(model(torch.tensor(padding)), base(torch.tensor(padding)))
    reduce_rank(model, rank=2)
    model.merge_adapter()
    assert difference(layer.base_layer.weight[padding].detach(), base.weight[padding].detach()) < EXACT


def test_with_a_padding_v_has_one_row_less_to_choose_from():
    with pytest.raises(ValueError, match=r"^r: found 4 for the layer '0' of 4 inputs and 7 .* at most 3;"):
        one_layer(nn.Embedding(4, 7, padding_idx=0), r=4)
    one_layer(nn.Embedding(4, 7), r=4)
    model, _ = one_layer(nn.Embedding(4, 7, padding_idx=0), r=3)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")


@pytest.mark.parametrize("padding", [None, 2])
def test_gradients_by_frequency_are_those_of_v(padding):
    base = nn.Embedding(13, 7, padding_idx=padding, scale_grad_by_freq=True, dtype=torch.float64)
    plain = nn.Embedding(13, 7, padding_idx=padding, _weight=base.weight.detach().clone())
    _, layer = one_layer(base)
    U, S, Vt = torch.autograd.grad(layer(IDS).square().sum(), layer.factors("default"))
    wanted = torch.autograd.grad(dense(plain, IDS, update(layer)).square().sum(), layer.factors("default"))
    often = torch.bincount(IDS.flatten(), minlength=13).clamp(min=1)
    assert difference(U, wanted[0]) < 10 * EXACT
    assert difference(S, wanted[1]) < 10 * EXACT
    assert difference(Vt, wanted[2] / often) < 10 * EXACT


def test_a_sparse_embedding_has_dense_gradients_that_every_optimizer_takes():
    model, layer = one_layer(nn.Embedding(13, 7, sparse=True))
    optimizer = torch.optim.AdamW(layer.factors("default"), lr=1e-2, weight_decay=0.0)
    attach(optimizer, model, grad_scaling=7)
    model(IDS).square().sum().backward()
    assert {factor.grad.layout for factor in layer.factors("default")} == {torch.strided}
    optimizer.step()
    # a float32 factor of up to 13 rows and 3 columns after one retraction
    assert orthonormality(model) < 32 * torch.finfo(torch.float32).eps


def test_the_coupled_gradient_of_an_embedding_is_the_direct_one():
    models = [one_layer(nn.Embedding(13, 7, padding_idx=2, dtype=torch.float64))[0]]
    models.append(copy.deepcopy(models[0]))
    for model, coupled in zip(models, (True, False), strict=True):
        optimizer = StellaAdamW(model, lr=1e-2, grad_scaling=7, coupled=coupled)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).square().sum().backward()
            optimizer.step()
    # K = ∇ᵀY of two formulas, each exact to EXACT; Adam divides by sqrt(v), which three steps move by little
    assert difference(models[0](IDS).detach(), models[1](IDS).detach()) < 1e-9


@pytest.mark.parametrize("diagonal", [False, True])
def test_sums_and_imports_leave_the_padding_exactly_zero(tmp_path, diagonal):
    model, layer = one_layer(nn.Embedding(13, 7, padding_idx=0), stella_diag_s=diagonal)
    model.add_adapter("other", StellaConfig(r=2, target_modules=["0"], stella_diag_s=diagonal))
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["default", "other"], [1.0, -2.0], kind, combination_type=kind)
        assert torch.equal(layer.factors(kind)[2][:, 0], torch.zeros(layer.r[kind]))
        # factors of 13 rows, rounded to float32: 2 sqrt(r) eps, and float64's own
        assert orthonormality(model, kind) < 8 * torch.finfo(torch.float32).eps
    theirs = get_peft_model(nn.Sequential(nn.Embedding(13, 7, padding_idx=0)), LoraConfig(r=3, target_modules=["0"]))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-1)
    (theirs(torch.where(IDS == 2, 0, IDS)) - 1).square().sum().backward()
    optimizer.step()
    theirs.save_pretrained(tmp_path / "lora")
    import_adapter(tmp_path / "lora", tmp_path / "stella", diagonal=diagonal)
    Vt = load_file(tmp_path / "stella" / "adapter_model.safetensors")["base_model.model.0.stella_Vt.weight"]
    assert torch.equal(Vt[:, 0], torch.zeros(3))
    assert difference(Vt @ Vt.mT, torch.eye(3)) < 8 * torch.finfo(torch.float32).eps

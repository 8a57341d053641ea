"""``reduce_rank``: each layer's truncated SVD, a budget over layers, saved and loaded, an optimizer that follows."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel

from stella_kernels.checks import NonFiniteError
from stella_kernels.optim import StellaAdamW
from stella_kernels.peft import attach_adapter, reduce_rank
from tests.peft.models import (
    SAME_LOGITS,
    adapted,
    difference,
    llama,
    logits,
    orthonormality,
    stella_layers,
    tokens,
    trained,
)

PREFIX = "base_model.model."
STARTS = {
    "full": {},
    "diagonal": {"stella_diag_s": True},
    "pseudo_zero": {"init_lora_weights": "pseudo_zero"},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"q_proj": 9, "up_proj": 2}, "alpha_pattern": {"k_proj": 3}},
}


def updates(model):
    """``s (U S Vᵀ − U0 V0ᵀ)`` of every layer in float64: nearly equal singular values magnify what rounding does."""
    found = {}
    for name, layer in stella_layers(model).items():
        U, S, Vt = (factor.detach().double() for factor in layer.factors("default"))
        product = U @ (torch.diag(S) if S.dim() == 1 else S) @ Vt
        if (start := layer.start("default")) is not None:
            product = product - start[0].double() @ start[1].double()
        found[name.removeprefix(PREFIX)] = layer.scaling["default"] * product
    return found


def truncated(delta, rank):
    P, values, Qt = torch.linalg.svd(delta, full_matrices=False)
    return P[:, :rank] * values[:rank] @ Qt[:rank]


@pytest.mark.parametrize("cut", [{"rank": 3}, {"rank": 1}, {"energy": 0.8}, {"budget": 40}, {"rank": 100}])
@pytest.mark.parametrize("start", STARTS)
def test_the_cut_is_the_truncated_svd_of_every_update(start, cut):
    model = trained(llama(), r=5, **STARTS[start])
    before = updates(model)
    ranks = reduce_rank(model, **cut)
    assert ranks.keys() == before.keys()
    for name, delta in updates(model).items():
        layer = model.get_submodule(PREFIX + name)
        assert layer.r["default"] == ranks[name] == layer.factors("default")[0].shape[1]
        kept = ranks[name] if layer.start("default") is None else 2 * ranks[name]  # a start that was not cut stays
        # float32 factors: products and orthonormality to some eps, 6e-8
        assert float((delta - truncated(before[name], kept)).norm() / before[name].norm()) < 1e-6
        values = torch.linalg.svdvals(before[name]).square()
        if "energy" in cut:
            assert float(values[: ranks[name]].sum() / values.sum()) > 0.8 - 1e-6
            assert float(values[: ranks[name] - 1].sum() / values.sum()) < 0.8 + 1e-6
    if "budget" in cut:
        assert sum(ranks.values()) == 40
        values = {name: torch.linalg.svdvals(delta) for name, delta in before.items()}
        least_kept = min(float(values[n][r - 1]) for n, r in ranks.items() if r > 1)
        assert all(float(values[n][r]) < least_kept * (1 + 1e-5) for n, r in ranks.items())
    assert orthonormality(model) < 1e-5


@pytest.mark.parametrize("cut", [{"rank": 2}, {"budget": 30}])
@pytest.mark.parametrize("start", STARTS)
def test_what_was_cut_is_saved_and_loaded(tmp_path, start, cut):
    base = llama()
    fresh = copy.deepcopy(base)
    model, ids = trained(base, **STARTS[start]), tokens()
    reduce_rank(model, **cut)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS
    for name, layer in stella_layers(model).items():
        there = stella_layers(loaded)[name]
        assert there.r["default"] == layer.r["default"]
        assert there.scaling["default"] == pytest.approx(layer.scaling["default"], rel=1e-12)


def test_parameters_stay_the_same_objects_and_a_scale_that_was_set_stays():
    model = trained(llama(), r=6, target_modules=["q_proj"])
    layers = stella_layers(model)
    ids = {name: [id(p) for p in layer.factors("default")] for name, layer in layers.items()}
    for layer in layers.values():
        layer.set_scale("default", 0.25)
    before = updates(model)
    reduce_rank(model, 4)
    assert {name: [id(p) for p in layer.factors("default")] for name, layer in layers.items()} == ids
    for name, delta in updates(model).items():
        assert float((delta - truncated(before[name], 4)).norm() / before[name].norm()) < 1e-6


def test_what_cannot_be_cut_is_named_and_nothing_changes():
    model = trained(llama(), target_modules=["q_proj", "k_proj"])
    before = copy.deepcopy(model.state_dict())
    for error, argument, arguments in (
        (ValueError, "rank, energy, budget: found none", {}),
        (ValueError, "rank, energy, budget: found", {"rank": 2, "budget": 9}),
        (ValueError, "rank: found 0", {"rank": 0}),
        (TypeError, "rank: found 2.5", {"rank": 2.5}),
        (ValueError, "energy: found 1.5", {"energy": 1.5}),
        (ValueError, "budget: found 3 for 4 layers", {"budget": 3}),
        (ValueError, "adapter_name: found 'other'", {"rank": 2, "adapter_name": "other"}),
    ):
        with pytest.raises(error, match=rf"^{argument}"):
            reduce_rank(model, **arguments)
    with pytest.raises(TypeError, match="model: found no StelLA layer"):
        reduce_rank(llama(), 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into"):
        reduce_rank(model, 2)
    model.unmerge_adapter()
    S = list(stella_layers(model).values())[-1].factors("default")[1]
    kept = S.data[0, 0].clone()
    S.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"k_proj|q_proj"):
        reduce_rank(model, 2)
    S.data[0, 0] = kept
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if "stella_" in key)


def step(model, optimizer, ids):
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def make(kind, model):
    if kind == "StellaAdamW":
        return StellaAdamW(model, lr=3e-3)
    optimizer = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0, amsgrad=True),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }[kind]([p for p in model.parameters() if p.requires_grad])
    attach_adapter(optimizer, model)
    return optimizer


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "StellaAdamW"])
def test_moments_follow_the_rotation_and_the_cut(kind, diagonal):
    model, ids = trained(llama(), r=6, target_modules=["q_proj", "up_proj"], stella_diag_s=diagonal), tokens()
    model.train()
    optimizer = make(kind, model)
    for _ in range(3):
        step(model, optimizer, ids)
    layers = stella_layers(model)
    old = {
        name: [(p.detach().double().clone(), copy.deepcopy(optimizer.state[p])) for p in layer.factors("default")]
        for name, layer in layers.items()
    }
    reduce_rank(model, 4, optimizer=optimizer)
    for name, layer in layers.items():
        (U, of_U), (_, of_S), (Vt, of_Vt) = old[name]
        new_U, new_S, new_Vt = layer.factors("default")
        left = U.mT @ new_U.detach().double()  # (6, 4): of an orthonormal U, the rotation and the cut
        right = Vt @ new_Vt.detach().double().mT
        for key in of_U:
            if key == "step" or of_U[key] is None:
                assert optimizer.state[new_U][key] == of_U[key]
                continue
            L, R = (left.square(), right.square()) if key.endswith("sq") else (left, right)
            found = [optimizer.state[p][key] for p in (new_U, new_S, new_Vt)]
            assert [t.shape for t in found] == [new_U.shape, new_S.shape, new_Vt.shape]
            core = of_S[key].double()
            of_core = (L * R).mT @ core if diagonal else L.mT @ core @ R
            wanted = [of_U[key].double() @ L, of_core, R.mT @ of_Vt[key].double()]
            for one, other in zip(found, wanted, strict=True):
                # the rotation is read off float32 factors here, to some eps of float32
                assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    losses = [step(model, optimizer, ids) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert orthonormality(model) < 1e-5


def test_momentum_goes_on_along_the_very_same_path():
    """The gradients of the turned factors are the turned gradients: where nothing is left out, nothing changes."""
    model, ids = trained(llama(dtype=torch.float64), r=4, target_modules=["q_proj", "up_proj"]), tokens()
    with torch.no_grad():
        for layer in stella_layers(model).values():
            S = layer.factors("default")[1]
            P, _, Qt = torch.linalg.svd(S)
            # of rank 3: the directions of U and V that are left out have no gradient
            S.copy_(P * torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=S.dtype) @ Qt)
    turned, losses = copy.deepcopy(model), []
    for each in (model, turned):
        factors = [p for layer in stella_layers(each).values() for p in layer.factors("default")[::2]]
        # without geometry: on the manifold a direction without gradient turns along with the others
        optimizer = torch.optim.SGD(factors, lr=0.0, momentum=0.9)
        for _ in range(3):
            step(each, optimizer, ids)
        if each is turned:
            reduce_rank(turned, 3, optimizer=optimizer)
        optimizer.param_groups[0]["lr"] = 0.2
        losses.append([step(each, optimizer, ids) for _ in range(5)])
    one, other = torch.tensor(losses, dtype=torch.float64)
    assert torch.allclose(one, other, rtol=1e-9)
    assert one[0] - one[-1] > 1e-4


def test_optimizers_that_cannot_follow_are_refused_before_anything_changes():
    model, ids = trained(llama(), target_modules=["q_proj"]), tokens()
    optimizer = torch.optim.Adadelta([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer, ids)
    before = {key: value.clone() for key, value in model.state_dict().items() if "stella_" in key}
    with pytest.raises(ValueError, match=r"optimizer: found 'acc_delta'"):
        reduce_rank(model, 2, optimizer=optimizer)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(1.1)
    with pytest.raises(ValueError, match=r"optimizer: found one that trains .* off its manifold"):
        reduce_rank(model, 2, optimizer=torch.optim.AdamW(model.parameters()))
    joined = trained(llama(), target_modules=["q_proj"], init_lora_weights="pseudo_zero")
    with pytest.raises(ValueError, match=r"optimizer: found one that trains .*pseudo_zero"):
        reduce_rank(joined, 2, optimizer=make("AdamW", joined))
    changed = [key for key, value in before.items() if not torch.equal(model.state_dict()[key], value)]
    assert len(changed) == 1  # by the test


def test_factors_of_an_adapter_that_does_not_train_are_cut_alone():
    model = adapted(llama(), target_modules=["q_proj"])
    model.eval().requires_grad_(False)
    assert set(reduce_rank(model, 1).values()) == {1}

"""Weighted sums of adapters: 'cat' exact, 'svd' the truncated SVD, negative weights, what cannot be summed refused."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel

from stella_kernels.peft import StellaConfig
from tests.peft.models import (
    SAME_LOGITS,
    Mlp,
    adapted,
    difference,
    llama,
    logits,
    orthonormality,
    stella_layers,
    tokens,
)


def two_adapters(base, first=(), second=()):
    """'default' and 'second', of other ranks, scales and layers, every factor away from its start."""
    model = adapted(base, r=3, lora_alpha=7, target_modules=["up", "down"], **dict(first))
    model.add_adapter("second", StellaConfig(**{"r": 2, "use_rslora": True, "target_modules": ["up"], **dict(second)}))
    with torch.no_grad():
        for layer in stella_layers(model).values():
            for adapter in layer.stella_U:
                U, S, Vt = layer.factors(adapter)
                torch.nn.init.orthogonal_(U)
                torch.nn.init.orthogonal_(Vt)
                S.normal_()
    return model


def update(model, layer, adapter):
    layer = model.base_model.model.get_submodule(layer)
    return layer.get_delta_weight(adapter).detach() if adapter in layer.stella_U else 0.0


STARTS = [
    ((), ()),
    ((("init_lora_weights", "pseudo_zero"),), (("stella_diag_s", True),)),
    ((("stella_diag_s", True),), (("stella_diag_s", True), ("init_lora_weights", "pseudo_zero"))),
]


@pytest.mark.parametrize(("first", "second"), STARTS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0), (0.0, 1.5)])
def test_cat_is_exact(first, second, weights):
    model = two_adapters(Mlp(), first, second)
    model.add_weighted_adapter(["default", "second"], list(weights), "sum", combination_type="cat")
    for layer in ("up", "down"):
        wanted = sum(w * update(model, layer, name) for w, name in zip(weights, ("default", "second"), strict=True))
        # float64 throughout: some hundred products of eps 2e-16
        assert torch.allclose(update(model, layer, "sum"), wanted, atol=1e-12)
    assert orthonormality(model, "sum") < 1e-12
    model.set_adapter("sum")
    x = torch.randn(5, 8, dtype=torch.float64)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(model(x), merged(x), atol=1e-12)


@pytest.mark.parametrize(("first", "second"), STARTS)
@pytest.mark.parametrize("svd_rank", [None, 1, 4, 50])
def test_svd_is_the_truncated_svd(first, second, svd_rank):
    model = two_adapters(Mlp(), first, second)
    model.add_weighted_adapter(["default", "second"], [0.7, -1.1], "sum", "svd", svd_rank=svd_rank, svd_driver=None)
    layer = model.base_model.model.up
    wanted = 0.7 * update(model, "up", "default") - 1.1 * update(model, "up", "second")
    P, values, Qt = torch.linalg.svd(wanted, full_matrices=False)
    both_ranks = {name: layer.r[name] * (2 if layer.start(name) else 1) for name in ("default", "second")}
    kept = min(svd_rank or max(both_ranks.values()), sum(both_ranks.values()))
    assert layer.r["sum"] == min(kept, 8)  # the smaller side
    best = P[:, :kept] * values[:kept] @ Qt[:kept]
    assert torch.allclose(update(model, "up", "sum"), best, atol=1e-12)
    assert layer.stella_S["sum"].weight.dim() == (1 if dict(first).get("stella_diag_s") else 2)


def test_subtract_and_a_single_adapter():
    model = two_adapters(Mlp())
    model.subtract("default", "second", "difference")
    model.add_weighted_adapter(["second"], [-0.5], "less")
    for layer in ("up", "down"):
        wanted = update(model, layer, "default") - update(model, layer, "second")
        assert torch.allclose(update(model, layer, "difference"), wanted, atol=1e-12)
    assert torch.allclose(update(model, "up", "less"), -0.5 * update(model, "up", "second"), atol=1e-12)
    assert "less" not in model.base_model.model.down.stella_U


def test_the_sum_is_inactive_frozen_saved_and_loaded(tmp_path):
    base = llama()
    fresh = copy.deepcopy(base)
    model = adapted(base, target_modules=["q_proj", "up_proj"])
    model.add_adapter(
        "second", StellaConfig(r=40, target_modules=["o_proj", "q_proj"], rank_pattern={"q_proj": 30, "o_proj": 9})
    )
    ids = tokens()
    before = logits(model, ids)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["default", "second"], [1.0, -0.4], "sum", "cat")
    assert torch.equal(logits(model, ids), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert model.peft_config["sum"].r == 32  # 4 + 30 of a layer of 32
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "sum")
    assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS


def test_what_cannot_be_summed_is_refused_and_changes_nothing():
    model = two_adapters(Mlp())
    both = ["default", "second"]
    for error, argument, call in (
        (NotImplementedError, "combination_type", (both, [1, 1], "sum", "ties")),
        (NotImplementedError, "combination_type", (both, [1, 1], "sum", "linear")),
        (ValueError, "adapter_name", (both, [1, 1], "second")),
        (ValueError, "adapters", (["default", "third"], [1, 1], "sum")),
        (ValueError, "adapters", (["default", "default"], [1, 1], "sum")),
        (ValueError, "adapters", ([], [], "sum")),
        (ValueError, "weights", (both, [1], "sum")),
        (ValueError, "weights", (both, [1, float("nan")], "sum")),
        (TypeError, "weights", (both, [1, "2"], "sum")),
        (ValueError, "svd_rank", (both, [1, 1], "sum", "svd", 0)),
        (ValueError, "svd_rank", (both, [1, 1], "sum", "cat", 3)),
    ):
        with pytest.raises(error, match=rf"^{argument}: found"):
            model.add_weighted_adapter(*call)
    with pytest.raises(NotImplementedError, match=r"^density: found"):
        model.add_weighted_adapter(both, [1, 1], "sum", "svd", density=0.5)
    model.add_adapter("extra", StellaConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"modules_to_save"):
        model.add_weighted_adapter(["default", "extra"], [1, 1], "sum")
    assert "sum" not in model.peft_config
    assert not any(".sum." in key for key in model.state_dict())

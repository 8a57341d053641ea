"""An embedding that shares its weight with the head: an adapter of one is none of the other's, also when merged."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("peft")

from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from stella_kernels.peft import StellaConfig
from tests.peft.models import SAME_LOGITS, adapted, difference, llama, logits, stella_layers, stir, tokens

MERGE = r"^merge: the weight of 'model\.embed_tokens' is also that of 'lm_head', to which its adapter adds nothing"


def tied(*targets: str) -> tuple[nn.Module, nn.Module]:
    base = llama(tie_word_embeddings=True)
    fresh = copy.deepcopy(base)
    with warnings.catch_warnings():  # PEFT's, of what we do about it
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        return fresh, stir(adapted(base, target_modules=list(targets)))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_merging_unties_with_a_warning_and_unmerging_ties_again(targets):
    fresh, model = tied(*targets)
    ids = tokens()
    wanted, shared = logits(model, ids), model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight is shared
    with pytest.warns(UserWarning, match=MERGE) as seen:
        model.merge_adapter(safe_merge=True)
    assert not [each for each in seen if "can lead to complications" in str(each.message)]
    assert difference(logits(model, ids), wanted) < SAME_LOGITS
    assert {name for name, _ in model.named_parameters() if "shared" in name} == set()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.unmerge_adapter()
        assert one.get_input_embeddings().weight is one.get_output_embeddings().weight
        assert difference(logits(one, ids), wanted) < SAME_LOGITS
    assert model.get_output_embeddings().weight is shared
    assert torch.equal(shared, fresh.get_output_embeddings().weight)


@pytest.mark.parametrize("before", [False, True])
def test_a_merged_model_is_right_and_loads_right(tmp_path, before):
    _, model = tied("embed_tokens")
    ids = tokens()
    wanted = logits(model, ids)
    if before:
        with pytest.warns(UserWarning, match=MERGE):
            model.merge_adapter()
        merged = model.merge_and_unload()
    else:
        with pytest.warns(UserWarning, match=MERGE):
            merged = model.merge_and_unload()
    assert difference(logits(merged, ids), wanted) < SAME_LOGITS
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert difference(logits(loaded, ids), wanted) < SAME_LOGITS


def test_of_other_layers_of_a_tied_model_nothing_is_said_and_it_stays_tied():
    _, model = tied("q_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is True
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


@pytest.mark.parametrize("unload", [False, True])
def test_a_merge_that_fails_leaves_them_tied(monkeypatch, unload):
    _, model = tied("embed_tokens", "q_proj")
    ids = tokens()
    wanted, shared = logits(model, ids), model.get_output_embeddings().weight

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("half-way")

    last = list(stella_layers(model).values())[-1]
    monkeypatch.setattr(last, "merge", fail)
    with pytest.raises(RuntimeError, match="half-way"), pytest.warns(UserWarning, match=MERGE):
        (model.merge_and_unload if unload else model.merge_adapter)()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is shared
    assert difference(logits(model, ids), wanted) < SAME_LOGITS


class TwoHeads(nn.Module):
    """Ties that no configuration tells of: two linear layers of one weight, and one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.twice(self.twice(x)))))


def test_linear_layers_that_share_a_weight():
    base = TwoHeads()
    model = stir(adapted(base, target_modules=["first", "twice"]))
    x = torch.randn(5, 6, dtype=torch.float64)
    wanted = model(x).detach()
    with pytest.warns(UserWarning, match=r"^merge: the weight of 'first' is also that of 'second'"):
        merged = model.merge_and_unload()
    # a few dozen roundings of 2.2e-16, with room
    assert difference(merged(x).detach(), wanted) < 1e-13


@pytest.mark.skipif(not hasattr(BaseTuner, "_add_targets_to_tie"), reason="this PEFT ties no adapters")
def test_tying_the_adapters_is_refused():
    with pytest.raises(ValueError, match=r"^ensure_weight_tying: found True with an embedding among target_modules"):
        adapted(llama(tie_word_embeddings=True), target_modules=["embed_tokens"], ensure_weight_tying=True)


def test_a_weight_of_three_modules_is_not_merged_into() -> None:
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    model = get_peft_model(BartForConditionalGeneration(config), StellaConfig(r=4, target_modules=["lm_head"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="wanted it shared with one other module at most"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Nothing was changed"):
        model.merge_and_unload()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_weight_that_all_sharers_adapt_follows_a_model_cast_while_merged() -> None:
    _, model = tied("embed_tokens", "lm_head")
    with pytest.warns(UserWarning, match="is also that of"):
        model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    first, second = (layer.get_base_layer().weight for layer in stella_layers(model).values())
    assert first is second
    assert first.dtype == torch.float64

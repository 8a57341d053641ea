"""What PEFT trains beside an adapter of embeddings: single tokens, and embeddings that a model ties to its head."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

from stella_kernels.peft import StellaConfig
from tests.peft.models import SAME_LOGITS, adapted, difference, llama, logits, tokens

TIES = pytest.mark.skipif(not hasattr(BaseTuner, "_add_modules_to_save_to_tie"), reason="this PEFT ties nothing")


@pytest.mark.parametrize("indices", [[1, 5, 9], {"embed_tokens": [0, 3]}])
def test_single_tokens_are_trained_saved_loaded_and_merged(tmp_path, indices):
    base = llama()
    fresh, ids = copy.deepcopy(base), torch.arange(12)[None]
    model = adapted(base, target_modules=["q_proj"], init_lora_weights="zero", trainable_token_indices=indices)
    lora = get_peft_model(copy.deepcopy(fresh), LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices))

    def beside(m):
        return {re.sub(r"\.(stella|lora)_.*", "", n): p.shape for n, p in m.named_parameters() if p.requires_grad}

    assert beside(model).keys() == beside(lora).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                assert parameter.requires_grad
                parameter.normal_(std=0.3)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    assert difference(logits(loaded, ids), wanted) < SAME_LOGITS
    assert difference(logits(fresh, ids), wanted) > 1e-2
    assert difference(logits(model.merge_and_unload(), ids), wanted) < SAME_LOGITS


@TIES
def test_tied_embeddings_stay_tied(tmp_path):
    base = llama(tie_word_embeddings=True)
    fresh, ids = copy.deepcopy(base), tokens()
    model = adapted(base, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        embedding.modules_to_save["default"].weight.normal_(std=0.3)
    assert head.modules_to_save["default"].weight.data_ptr() == embedding.modules_to_save["default"].weight.data_ptr()
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert difference(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), wanted) < SAME_LOGITS


def test_an_older_peft_that_would_tie_nothing_is_refused(monkeypatch):
    monkeypatch.delattr(BaseTuner, "_add_modules_to_save_to_tie", raising=False)
    with pytest.raises(ValueError, match=r"^ensure_weight_tying: found True, but the installed PEFT"):
        get_peft_model(llama(), StellaConfig(target_modules=["q_proj"], ensure_weight_tying=True))


@pytest.mark.parametrize("bad", [3, "all", {"embed_tokens": 3}, [1.5], [True]])
def test_token_indices_are_checked(bad):
    with pytest.raises(TypeError, match=r"^trainable_token_indices: found"):
        StellaConfig(trainable_token_indices=bad)

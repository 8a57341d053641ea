"""A StelLA adapter as a LoRA adapter: exactly the same model, for plain PEFT without this package."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from stella_kernels.checks import NonFiniteError
from stella_kernels.peft import StellaConfig, convert_to_lora, save_as_lora
from stella_kernels.serving import export_adapter
from tests.peft.models import (
    SAME_LOGITS,
    adapted,
    difference,
    gpt2,
    llama,
    logits,
    stella_layers,
    stir,
    tokens,
    trained,
)

STARTS = {
    "rando": {},
    "svd_major": {"init_lora_weights": "svd_major"},
    "pseudo_zero": {"init_lora_weights": "pseudo_zero"},
    "diagonal": {"stella_diag_s": True},
    "diagonal pseudo_zero": {"stella_diag_s": True, "init_lora_weights": "pseudo_zero"},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"rank_pattern": {"q_proj": 8, "layers.0.mlp.up_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 3}},
    "regular expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """{(start, how it was exported): (logits of plain PEFT, of StelLA, of the merged model)}, by one other process."""
    folder = tmp_path_factory.mktemp("served")
    cases, wanted = [], {}
    for start, settings in STARTS.items():
        torch.manual_seed(sum(map(ord, start)))
        base = llama()
        model, ids = trained(copy.deepcopy(base), **settings), tokens()
        exact = logits(model, ids)
        model.save_pretrained(folder / start)
        for how in ("model", "model, ranks as they are", "files", "files, ranks as they are"):
            target = folder / f"{start}, {how}"
            as_they_are = how.endswith("are")
            if how.startswith("files"):
                export_adapter(folder / start, target, rank_pattern=as_they_are)
            else:
                save_as_lora(target, model, rank_pattern=as_they_are)
            cases.append((base, str(target), ids))
            wanted[start, how] = exact
        merged = logits(model.merge_and_unload(), ids)
        wanted.update({key: (value, merged) for key, value in wanted.items() if key[0] == start})
    torch.save(cases, folder / "cases.pt")
    script = Path(__file__).with_name("plain_peft.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "logits.pt")
    return {key: (one, *wanted[key]) for key, one in zip(wanted, found, strict=True)}


@pytest.mark.parametrize("how", ["model", "model, ranks as they are", "files", "files, ranks as they are"])
@pytest.mark.parametrize("start", STARTS)
def test_plain_peft_serves_the_same_model(served, start, how):
    found, exact, merged = served[start, how]
    # the same products as the adapter's own, in another order; a start is subtracted from a number of its own size
    assert difference(found, exact) < SAME_LOGITS
    assert difference(found, exact) < 8 * difference(merged, exact) + SAME_LOGITS / 8


def products(state, name):
    return (
        state[f"base_model.model.{name}.lora_B.weight"].double()
        @ state[f"base_model.model.{name}.lora_A.weight"].double()
    )


def updates(model):
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().double()
        for name, layer in stella_layers(model).items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_rounded_once_to_the_dtype_asked_for(dtype):
    model = trained(llama(), target_modules=["q_proj", "down_proj"])
    config, state = convert_to_lora(model, dtype=dtype)
    assert isinstance(config, LoraConfig)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    for name, layer in stella_layers(model).items():
        U, S, Vt = (factor.detach().double() for factor in layer.factors("default"))
        assert torch.equal(state[f"{name}.lora_A.weight"], Vt.to(dtype))
        assert torch.allclose(
            state[f"{name}.lora_B.weight"].double(),
            (layer.scaling["default"] * U @ S).to(dtype).double(),
            rtol=2 * torch.finfo(dtype).eps,
            atol=1e-12,
        )


def test_conv1d_is_converted_in_its_own_layout(tmp_path):
    base = gpt2()
    fresh = copy.deepcopy(base)
    model = trained(base, target_modules=["c_attn", "c_fc", "mlp.c_proj"])
    ids = tokens()
    save_as_lora(tmp_path, model)
    assert difference(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids)) < SAME_LOGITS


def test_the_scale_that_is_set_now_is_what_is_converted():
    model = trained(llama(), target_modules=["q_proj"], lora_alpha=16)
    for layer in stella_layers(model).values():
        layer.set_scale("default", 0.5)
    _, state = convert_to_lora(model)
    for name, delta in updates(model).items():
        assert float((products(state, name) - delta).norm() / delta.norm()) < 1e-6


def test_smaller_ranks_are_filled_up_with_zeros_or_written_down():
    model = trained(llama(), rank_pattern={"q_proj": 8, "v_proj": 2}, target_modules=["q_proj", "k_proj", "v_proj"])
    config, state = convert_to_lora(model)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (8, 8, {}, {})
    assert {len(tensor) for key, tensor in state.items() if "lora_A" in key} == {8}
    config, state = convert_to_lora(model, rank_pattern=True)
    assert config.r == config.lora_alpha == 8
    assert sorted(config.rank_pattern.values()) == [2, 2, 4, 4]
    assert config.alpha_pattern == config.rank_pattern
    assert {len(tensor) for key, tensor in state.items() if "v_proj.lora_A" in key} == {2}


@pytest.mark.parametrize("start", ["rando", "pseudo_zero"])
@pytest.mark.parametrize("rank", [3, 0.9])
def test_a_rank_that_is_asked_for_cuts_as_the_singular_values_do(start, rank):
    model = trained(llama(), target_modules=["q_proj", "up_proj"], init_lora_weights=start)
    config, state = convert_to_lora(model, rank=rank)
    for name, delta in updates(model).items():
        P, values, Qt = torch.linalg.svd(delta, full_matrices=False)
        kept = rank if rank == 3 else 1 + int((values.square().cumsum(0) < 0.9 * values.square().sum()).sum())
        best = P[:, :kept] * values[:kept] @ Qt[:kept]
        # the update comes from float32 products of factors that are float32's round-off from orthonormal
        assert float((products(state, name) - best).norm() / delta.norm()) < 1e-6
    assert config.r == (3 if rank == 3 else max(len(t) for k, t in state.items() if "lora_A" in k))


def test_the_rank_is_reported_for_the_server(tmp_path):
    report = save_as_lora(tmp_path, trained(llama(), r=10, init_lora_weights="pseudo_zero"))
    assert report.rank == 20
    assert set(report.ranks.values()) == {20}
    assert len(report.ranks) == 14
    assert "--max-lora-rank 32" in str(report)
    assert report.size == sum(tensor.nbytes for tensor in load_file(tmp_path / "adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("extra", "settings"),
    [
        ("bias", {"bias": "lora_only"}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("trainable_token_indices", {"trainable_token_indices": [1, 5]}),
        ("layer_replication", {"layer_replication": [(0, 2), (0, 2)], "target_modules": ["q_proj"]}),
    ],
)
def test_what_servers_do_not_read_is_refused_or_written_for_peft(tmp_path, extra, settings):
    base = llama(attention_bias=True, tie_word_embeddings=False)
    fresh = copy.deepcopy(base)
    model = trained(base, **{"target_modules": ["q_proj", "o_proj"], **settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(
                mark in name for mark in ("bias", "modules_to_save", "trainable_tokens")
            ):
                parameter.normal_(std=0.1)
    ids = tokens()
    model.save_pretrained(tmp_path / "stella")
    with pytest.raises(ValueError, match=f"{extra}: found .*also"):
        save_as_lora(tmp_path / "lora", model)
    with pytest.raises(ValueError, match=f"{extra}: found .*also"):
        export_adapter(tmp_path / "stella", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    by_file = export_adapter(tmp_path / "stella", tmp_path / "files", also=[extra])
    report = save_as_lora(tmp_path / "lora", model, also=[extra])
    assert report.extras == by_file.extras == (extra,)
    assert extra in str(report)
    for folder in ("lora", "files"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / folder)
        assert difference(logits(loaded, ids), logits(model, ids)) < SAME_LOGITS


def test_bad_arguments_are_named_and_nothing_is_written(tmp_path):
    model = trained(llama(), target_modules=["q_proj"])
    for name, bad in (
        ("rank", {"rank": 0}),
        ("rank", {"rank": 1.5}),
        ("rank", {"rank": True}),
        ("dtype", {"dtype": torch.int8}),
        ("also", {"also": "bias"}),
        ("also", {"also": ["biases"]}),
        ("adapter_name", {"adapter_name": "other"}),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: found"):
            save_as_lora(tmp_path / "out", model, **bad)
    with pytest.raises(TypeError, match="model: found no StelLA layer"):
        save_as_lora(tmp_path / "out", llama())
    next(iter(stella_layers(model).values())).factors("default")[1].data[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        save_as_lora(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_number_too_large_for_the_dtype_is_an_error():
    model = trained(llama(), target_modules=["q_proj"], lora_alpha=10**6)
    with pytest.raises(ValueError, match=r"dtype: .*q_proj overflows torch\.float16"):
        convert_to_lora(model, dtype=torch.float16)


def test_folders_that_hold_no_stella_adapter_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        export_adapter(tmp_path, tmp_path / "out")
    adapted(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "stella")
    with pytest.raises(ValueError, match="target: "):
        export_adapter(tmp_path / "stella", tmp_path / "stella")
    weights = tmp_path / "stella" / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = next(key for key in tensors if key.endswith("stella_Vt.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"q_proj: found the factors \['S', 'U'\]"):
        export_adapter(tmp_path / "stella", tmp_path / "out")
    export = tmp_path / "lora"
    save_as_lora(export, adapted(llama(), target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="peft_type 'LORA', wanted 'STELLA'"):
        export_adapter(export, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_half_precision_adapter_is_exported_as_it_would_be_loaded(tmp_path):
    model = trained(llama(), target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "stella")
    weights = tmp_path / "stella" / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    export_adapter(tmp_path / "stella", tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "stella")
    for name, delta in updates(loaded).items():
        assert float((products(state, name) - delta).norm() / delta.norm()) < 1e-6


def test_names_that_end_in_one_another_keep_their_ranks(tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(12, 12)
            self.block = torch.nn.ModuleDict({"proj": torch.nn.Linear(12, 12)})

        def forward(self, x):
            return self.block["proj"](self.proj(x).tanh())

    base = Twice()
    fresh = copy.deepcopy(base)
    model = stir(adapted(base, target_modules=["proj"], r=4, rank_pattern={"^proj": 2}))
    x = torch.randn(5, 12)
    save_as_lora(tmp_path, model, rank_pattern=True)
    with torch.no_grad():
        assert difference(PeftModel.from_pretrained(fresh, tmp_path)(x), model(x)) < SAME_LOGITS


def test_an_adapter_injected_into_a_bare_model_is_converted(tmp_path):
    from peft import inject_adapter_in_model

    base = llama()
    fresh = copy.deepcopy(base)
    model = stir(inject_adapter_in_model(StellaConfig(r=4, target_modules=["q_proj", "up_proj"]), base))
    _, state = convert_to_lora(model)
    assert "model.layers.0.mlp.up_proj.lora_A.weight" in state
    save_as_lora(tmp_path, model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    ids = tokens()
    assert difference(logits(PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids)) < SAME_LOGITS


def test_exports_are_swapped_into_a_running_model(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    base, ids = llama(), tokens()
    wanted = {}
    for name, settings in (("one", {}), ("two", {"stella_diag_s": True, "lora_alpha": 16})):
        model = trained(copy.deepcopy(base), target_modules=["q_proj", "up_proj"], **settings)
        save_as_lora(tmp_path / name, model)
        wanted[name] = logits(model, ids)
    served = PeftModel.from_pretrained(base, tmp_path / "one")
    assert difference(logits(served, ids), wanted["one"]) < SAME_LOGITS
    hotswap_adapter(served, str(tmp_path / "two"), adapter_name="default")
    assert difference(logits(served, ids), wanted["two"]) < SAME_LOGITS

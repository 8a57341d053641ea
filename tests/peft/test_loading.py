"""What a checkpoint may hold: the state dict decides about a start, and what does not fit is named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import targets
from stella_kernels.peft import StellaConfig
from tests.peft.models import Mlp, adapted, stella_layers, stir

INITS = ["rando", "svd_major", "zero", "pseudo_zero", False]


def build(base: nn.Module, init: bool | str, **settings: object) -> nn.Module:
    model = adapted(copy.deepcopy(base), target_modules=["up", "down"], r=3, init_lora_weights=init, **settings)
    return stir(model)


def load(way: str, base: nn.Module, saved: nn.Module, init: bool | str, folder: Path) -> nn.Module:
    """A model whose adapter 'default' started as ``init`` and then took ``saved``'s tensors."""
    saved.save_pretrained(folder)
    if way == "state_dict":
        model = build(base, init)
        result = set_peft_model_state_dict(model, get_peft_model_state_dict(saved))
        assert not [key for key in result.missing_keys if "stella" in key]
        assert result.unexpected_keys == []
    elif way == "injected":
        settings = {"target_modules": ["up", "down"], "r": 3, "init_lora_weights": init}
        model = inject_adapter_in_model(StellaConfig(**settings), copy.deepcopy(base)).eval()
        # Only newer PEFTs take the wrapper's prefix off by themselves.
        state = {
            key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(saved).items()
        }
        assert set_peft_model_state_dict(model, state).unexpected_keys == []
    elif way == "torch":
        model = build(base, init)
        model.load_state_dict(saved.state_dict(), strict=False)
    else:
        path = folder / "adapter_config.json"
        stored = '"pseudo_zero"' if "pseudo_zero" in path.read_text() else None
        saved.peft_config["default"].init_lora_weights = init
        saved.peft_config["default"].save_pretrained(folder)
        assert stored is None or init == "pseudo_zero" or stored not in path.read_text()
        if way == "load_adapter":
            model = build(base, "zero")
            model.load_adapter(folder, adapter_name="other")
            model.set_adapter("other")
        else:
            low = way == "low_cpu_mem_usage"
            model = PeftModel.from_pretrained(copy.deepcopy(base), folder, low_cpu_mem_usage=low).eval()
    return model


@pytest.mark.parametrize(
    "way", ["state_dict", "injected", "torch", "load_adapter", "from_pretrained", "low_cpu_mem_usage"]
)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("saved_init", INITS)
def test_after_loading_the_option_no_longer_matters(saved_init, init, way, tmp_path):
    base = Mlp()
    saved = build(base, saved_init)
    x = torch.randn(4, 8, dtype=torch.float64)
    wanted = saved(x)
    model = load(way, base, saved, init, tmp_path)
    assert torch.equal(model(x), wanted)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    adapter = "other" if way == "load_adapter" else "default"
    for layer in stella_layers(model).values():
        assert (layer.start(adapter) is not None) == (saved_init == "pseudo_zero")
    assert not [n for n, p in model.named_parameters() if p.requires_grad and ("stella_U0" in n or "stella_Vt0" in n)]


def test_loading_one_adapter_leaves_the_start_of_another():
    model = build(Mlp(), "pseudo_zero")
    model.add_adapter("second", StellaConfig(r=3, target_modules=["up", "down"]))
    start = [layer.start("default")[0].clone() for layer in stella_layers(model).values()]
    state = get_peft_model_state_dict(model, adapter_name="second")
    set_peft_model_state_dict(model, state, adapter_name="second")
    for layer, kept in zip(stella_layers(model).values(), start, strict=True):
        assert torch.equal(layer.start("default")[0], kept)
        assert layer.start("second") is None


@pytest.mark.parametrize("init", ["rando", "pseudo_zero"])
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("U0", None, r"stella_Vt0\.default\.weight: found without its partner"),
        ("U0", lambda t: t[:-1], r"size mismatch for .*up\.stella_U0\.default"),
        ("U", lambda t: t.flatten().bfloat16(), r"size mismatch for .*up\.stella_U\.default\.weight"),
        ("U", lambda t: t.half()[None], r"size mismatch for .*up\.stella_U\.default\.weight"),
        ("U", lambda t: t.mT.bfloat16(), r"size mismatch for .*up\.stella_U\.default\.weight"),
        ("Vt", lambda t: t[0].half(), r"size mismatch for .*up\.stella_Vt\.default\.weight"),
        ("S", lambda t: t.diagonal().half(), r"size mismatch for .*up\.stella_S\.default\.weight"),
        ("S", lambda t: t[0, 0].bfloat16(), r"size mismatch for .*up\.stella_S\.default\.weight"),
        ("U", lambda t: t.to(torch.int8), r"up\.stella_U\.default\.weight: found dtype torch\.int8, wanted a float"),
        ("S", lambda t: t.to(torch.complex64), r"up\.stella_S\.default\.weight: found dtype torch\.complex64"),
        ("Vt0", lambda t: t.to(torch.uint8), r"up\.stella_Vt0\.default\.weight: found dtype torch\.uint8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(kind, change, message, init, tmp_path):
    base = Mlp()
    build(base, "pseudo_zero").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(f"up.stella_{kind}.weight"))
    value = tensors.pop(key)
    if change is not None:
        tensors[key] = change(value).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model = build(base, init)
    with pytest.raises(RuntimeError, match=message):
        set_peft_model_state_dict(model, tensors)
    if kind in ("U0", "Vt0"):  # a layer without a start was given none
        assert (stella_layers(model)["base_model.model.up"].start("default") is not None) == (init == "pseudo_zero")


@pytest.mark.parametrize("diag_s", [False, True])
def test_a_diagonal_and_a_full_s_of_rank_one_are_not_mistaken(diag_s):
    first, second = (adapted(Mlp(), target_modules=["up"], r=1, stella_diag_s=d) for d in (diag_s, not diag_s))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*stella_S"):
        set_peft_model_state_dict(second, get_peft_model_state_dict(first))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_factors_take_the_dtype_of_the_layer_and_are_back_on_the_manifold(dtype, low_cpu_mem_usage, tmp_path):
    """A float64 model: also float32 is narrower there."""
    base = Mlp()
    build(base, "pseudo_zero").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert {p.dtype for n, p in model.named_parameters() if "stella_" in n} == {torch.float64}
    targets.check_orthonormal(stiefel_factors(model))
    get_peft_model(Mlp(), StellaConfig(r=3, target_modules=["up"]))

"""Layers whose parent reads their weight instead of calling them: refused by name, or found when the model runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from stella_kernels.nn import StellaLinear
from stella_kernels.peft import StellaConfig
from tests.peft.models import Mlp, adapted, llama, stella_layers, tokens

D = 16


class Encoder(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, **{"batch_first": True, "dropout": 0.0, **settings})
        self.fc, self.blocks = nn.Linear(D, D), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.fc(x))


def encoder(**settings: object) -> nn.Module:
    return Encoder(**settings)


def decoder() -> nn.Module:
    return nn.ModuleDict({"block": nn.TransformerDecoderLayer(D, 2, 2 * D, batch_first=True), "fc": nn.Linear(D, D)})


@pytest.fixture
def fastpath_off() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


ATTENTION = r"'blocks\.layers\.0\.self_attn\.out_proj' .*nn\.MultiheadAttention reads its weight"
FEED_FORWARD = r"'blocks\.layers\.0\.linear[12]' .*nn\.TransformerEncoderLayer reads .*set_fastpath_enabled\(False\)"


def by_state_dict(model: nn.Module, config: StellaConfig) -> None:
    """PEFT takes the layers from the state dict, and the configuration does not name the one at fault."""
    named = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and check_target_module_exists(config, n)]
    state = {f"{name}.stella_U.weight": torch.zeros(1) for name in named}
    inject_adapter_in_model(StellaConfig(r=2, target_modules=["fc"]), model, state_dict=state)


WAYS = {
    "get_peft_model": lambda model, config: get_peft_model(model, config),
    "add_adapter": lambda model, config: model.add_adapter("second", config),
    "inject": lambda model, config: inject_adapter_in_model(config, model),
    "state_dict": by_state_dict,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (encoder, {"target_modules": ["fc", "out_proj"]}, ATTENTION),
        (encoder, {"target_modules": r".*layers\.0\.self_attn\.out_proj"}, ATTENTION),
        (encoder, {"target_modules": ["linear1"]}, FEED_FORWARD),
        (encoder, {"target_modules": r".*linear2"}, FEED_FORWARD),
        (decoder, {"target_modules": ["fc", "out_proj"]}, r"'block\.self_attn\.out_proj'"),
        (decoder, {"target_modules": ["multihead_attn.out_proj"]}, r"'block\.multihead_attn\.out_proj'"),
    ],
)
def test_refused_by_name_and_nothing_replaced(build, settings, message, way):
    model = build()
    if way == "add_adapter":
        model = get_peft_model(model, StellaConfig(r=2, target_modules=["fc"]))
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        WAYS[way](model, StellaConfig(r=2, **settings))
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("make", [encoder, decoder])
def test_all_linear_leaves_them_out_with_a_warning_and_excluding_them_is_quiet(make):
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out .*out_proj: .*nn\.MultiheadAttention reads"):
        model = adapted(make(), r=2)
    assert stella_layers(model)
    assert not [name for name in stella_layers(model) if name.endswith("out_proj")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = adapted(make(), r=2, exclude_modules=["out_proj", *(["linear1", "linear2"] if make is encoder else [])])
    assert stella_layers(quiet).keys() == stella_layers(model).keys()


def test_all_linear_of_nothing_else_is_an_error():
    with pytest.raises(ValueError, match="'all-linear' finds out_proj and no other"):
        adapted(nn.MultiheadAttention(D, 2), r=2)


def test_a_module_with_two_names_is_warned_of() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(9, D)
            self.encoder = nn.ModuleDict({"embed": self.shared, "fc": nn.Linear(D, D)})

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder["fc"](self.encoder["embed"](x))

    with pytest.warns(UserWarning, match=r"'shared' is the same module as 'encoder\.embed': PEFT puts the adapter"):
        get_peft_model(Tied(), StellaConfig(r=4, target_modules=["shared"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Tied(), StellaConfig(r=4, target_modules=["fc"]))


def test_the_configuration_of_all_linear_loads_again(tmp_path):
    base = encoder()
    with pytest.warns(UserWarning, match="leaves out"):
        model = adapted(copy.deepcopy(base), r=2)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("settings", [{"batch_first": False}, {"bias": False}, {"activation": torch.tanh}])
def test_layers_that_are_always_called_take_adapters(settings):
    """Each setting keeps torch's fused kernel out, so that evaluation is training without dropout."""
    _called_in_both_modes(encoder(**settings))


@pytest.mark.usefixtures("fastpath_off")
def test_the_advice_works():
    _called_in_both_modes(encoder())


def _called_in_both_modes(net: nn.Module) -> None:
    model, x = adapted(net, r=2, target_modules=["linear1", "linear2"]), torch.randn(2, 3, D)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        trained, evaluated = model.train()(x), model.eval()(x)
        with model.disable_adapter():
            base = model(x)
    torch.testing.assert_close(trained, evaluated)
    assert float((evaluated - base).norm()) > 0.1


@pytest.mark.parametrize("place", ["out_proj", "linear1"])
def test_a_parent_that_reads_the_weight_of_a_stella_linear_is_told(place):
    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True, dropout=0.0)
    parent = layer.self_attn if place == "out_proj" else layer
    setattr(parent, place, StellaLinear(getattr(parent, place), r=2))
    x = torch.randn(2, 3, D)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with pytest.raises(AttributeError, match=r"'StellaLinear' has no attribute 'weight': what reads the weight"):
        net(x)
    if place == "linear1":
        net.train()(x).sum().backward()
        assert all(copy_.linear1.U.grad is not None for copy_ in net.layers)
    assert not hasattr(StellaLinear(nn.Linear(3, 3), r=1), "weight")


def test_models_on_pefts_list_are_refused_as_for_lora():
    def mamba() -> nn.Module:
        return MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1))

    with pytest.raises(ValueError, match="out_proj"):
        get_peft_model(mamba(), LoraConfig(r=2, target_modules=["out_proj"]))
    for names in (["out_proj"], ["in_proj", "out_proj"], r".*out_proj"):
        with pytest.raises(ValueError, match=r"layers\.0\.mixer\.out_proj.* type 'mamba' hand its weight to a kernel"):
            get_peft_model(mamba(), StellaConfig(r=2, target_modules=names))
    with pytest.warns(UserWarning, match=r"leaves out backbone\.layers\.0\.mixer\.out_proj"):
        model = adapted(mamba(), r=1)
    assert [name for name in stella_layers(model) if name.endswith("in_proj")]


class Reads(nn.Module):
    """``read`` by its weight, always or in evaluation only, ``asked`` for its dtype and called, ``idle`` neither."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.read, self.asked, self.idle, self.when = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), when

    def forward(self, x: Tensor) -> Tensor:
        x = self.asked(x.to(self.asked.weight.dtype))
        reads = self.when == "always" or not self.training
        return nn.functional.linear(x, self.read.weight) if reads else self.read(x)


@pytest.mark.parametrize("when", ["always", "evaluation"])
def test_an_unknown_parent_that_reads_the_weight_is_found_once_in_each_mode(when):
    model, x = adapted(Reads(when), r=2, target_modules=["read", "asked", "idle"]), torch.randn(2, D)
    for training in (True, False):
        model.train(training)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(x)
            model(x)
        found = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
        if when == "evaluation" and training:
            assert found == []
        else:
            assert len(found) == 1
            assert "read the weight of read and did not call" in found[0]


def test_merged_and_disabled_adapters_are_not_looked_at():
    model, x = adapted(Reads("always"), r=2, target_modules=["read"]), torch.randn(2, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            model(x)
    model = adapted(Reads("always"), r=2, target_modules=["read"])
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_ordinary_models_are_quiet_and_generate():
    model, ids = adapted(llama()), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.eval().generate(input_ids=ids, max_new_tokens=2)
    mlp = adapted(Mlp(), target_modules=["up", "down"])
    assert torch.isfinite(mlp(torch.randn(2, 8, dtype=torch.float64))).all()

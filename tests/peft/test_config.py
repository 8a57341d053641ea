"""The configuration and the registration with PEFT."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("peft")

from packaging.version import Version
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from stella_kernels.peft import StellaConfig, StellaModel, registration
from tests.peft.models import Mlp, adapted

# FACTS: the fields of the published package and their defaults
PUBLISHED = {
    "r": 8,
    "target_modules": None,
    "exclude_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "stella_retraction": "polar",
    "stella_diag_s": False,
    "stella_grad_scaling": True,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
}


def test_has_every_published_field_with_its_default():
    config = StellaConfig()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED
    assert config.peft_type == "STELLA"


def test_peft_type_behaves_as_a_member():
    member = PeftType.STELLA
    assert PeftType("STELLA") is PeftType["STELLA"] is member
    assert isinstance(member, PeftType)
    assert (member.name, member.value) == ("STELLA", "STELLA")
    assert list(PeftType).count(member) == 1 == [t.name for t in PeftType].count("STELLA")
    assert pickle.loads(pickle.dumps(member)) is member is copy.deepcopy(member)
    assert json.dumps(member) == '"STELLA"'
    assert PeftType.LORA != member == "STELLA"


def test_registering_twice_changes_nothing():
    members, mapped = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    registration.extend_peft_type()
    registration.register(StellaConfig, StellaModel)
    assert list(PeftType) == members
    assert mapped == PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.STELLA] is StellaModel


def test_another_registration_is_not_overwritten():
    class Other:
        pass

    with pytest.raises(ImportError, match=r"already registered by stella_kernels\.peft\.config\.StellaConfig"):
        registration.register(Other, Other)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.STELLA] is StellaConfig


def test_survives_pickling_in_a_fresh_process(tmp_path):
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(StellaConfig(r=3, target_modules=["a"])))
    code = f"import pickle; c = pickle.load(open({str(path)!r}, 'rb')); print(c.r, c.peft_type.name, c.target_modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["3", "STELLA", "{'a'}"], done.stderr


def test_importing_the_package_does_not_import_peft():
    code = "import sys, stella_kernels; print([m for m in ('peft', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_peft_the_error_says_what_to_install():
    code = "import sys; sys.modules['peft'] = None; import stella_kernels.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: stella_kernels.peft needs" in done.stderr
    assert "pip install 'stella_kernels[peft]'" in done.stderr


def test_a_peft_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr("peft.__version__", "0.14.0")
    with pytest.raises(ImportError, match=rf"found PEFT 0\.14\.0, wanted {registration.OLDEST_PEFT}"):
        registration.require_peft()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "^r: found 0"),
        ({"r": -8}, "^r: found -8"),
        ({"target_modules": "*.q_proj"}, r"target_modules: found '\*\.q_proj', which is no regular expression"),
        ({"exclude_modules": "("}, r"exclude_modules: found '\(', which is no"),
        ({"rank_pattern": {"[q": 2}}, r"rank_pattern: found '\[q', which is no"),
        ({"alpha_pattern": {"q": float("inf")}}, r"alpha_pattern\['q'\]: found inf"),
        ({"target_modules": ["q"], "layers_to_transform": [-1]}, "layers_to_transform: found -1"),
        ({"layer_replication": [(2, 2)]}, r"layer_replication: found the range \(2, 2\)"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\]: found -1"),
        ({"lora_dropout": 1.0}, "lora_dropout: found 1.0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
        ({"stella_grad_scaling": float("inf")}, "stella_grad_scaling: found inf"),
        ({"stella_retraction": "svd"}, "stella_retraction: found 'svd'.*'cayley'"),
        ({"bias": "stella_only"}, "bias: found 'stella_only'"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights: found 'gaussian'"),
        ({"stella_grad_scaling": 0.0}, "stella_grad_scaling: found 0.0"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform: found"),
        ({"target_modules": "q.*", "layers_pattern": "layers"}, "layers_pattern: found"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "layers_pattern: found 'layers' without"),
    ],
)
def test_bad_fields_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StellaConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": "16"}, "lora_alpha: found '16'"),
        ({"lora_alpha": None}, "lora_alpha: found None"),
        ({"lora_dropout": "half"}, "lora_dropout: found 'half'"),
        ({"alpha_pattern": {"q": "8"}}, r"alpha_pattern\['q'\]: found '8'"),
        ({"rank_pattern": [4]}, r"rank_pattern: found \[4\], wanted a dictionary"),
        ({"rank_pattern": []}, r"rank_pattern: found \[\], wanted a dictionary"),
        ({"rank_pattern": {3: 4}}, "rank_pattern: found the key 3"),
        ({"rank_pattern": {"q": 2.0}}, r"rank_pattern\['q'\]: found 2\.0"),
        ({"rank_pattern": {"q": True}}, r"rank_pattern\['q'\]: found True"),
        ({"r": True}, "^r: found True"),
        ({"r": "8"}, "^r: found '8'"),
        ({"r": 8.0}, r"^r: found 8\.0"),
        ({"lora_dropout": True}, "lora_dropout: found True"),
        ({"stella_diag_s": "false"}, "stella_diag_s: found 'false', wanted True or False"),
        ({"use_rslora": 1}, "use_rslora: found 1"),
        ({"fan_in_fan_out": None}, "fan_in_fan_out: found None"),
        ({"stella_grad_scaling": "auto"}, "stella_grad_scaling: found 'auto'"),
        ({"stella_grad_scaling": None}, "stella_grad_scaling: found None"),
        ({"target_modules": 3}, "target_modules: found 3, wanted a regular expression, or a list of names"),
        ({"target_modules": ["q", 3]}, r"target_modules: found \['q', 3\]"),
        ({"target_modules": {"q": 1}}, "target_modules: found {'q': 1}"),
        ({"exclude_modules": [None]}, r"exclude_modules: found \[None\]"),
        ({"modules_to_save": "head"}, "modules_to_save: found 'head', wanted a list of names"),
        ({"target_modules": ["q"], "layers_to_transform": ["0"]}, "layers_to_transform: found '0'"),
        ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": 1}, "layers_pattern: found 1"),
        ({"layer_replication": [[0, 1, 2]]}, r"layer_replication: found \[\[0, 1, 2\]\]"),
        ({"layer_replication": {"0": 1}}, "layer_replication: found {'0': 1}"),
        ({"layer_replication": [(0, 1.5)]}, r"layer_replication: found 1\.5"),
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_fields_of_a_wrong_type_are_named(settings, message, from_file, tmp_path):
    if from_file:
        try:
            text = json.dumps({"peft_type": "STELLA", **settings})
        except TypeError:
            pytest.skip("not to be written as JSON")
        (tmp_path / "adapter_config.json").write_text(text)
        if 3 in settings.get("rank_pattern", {}):
            pytest.skip("JSON's keys are strings")
    with pytest.raises(TypeError, match=message.replace("(0, 1", "[0, 1")):
        PeftConfig.from_pretrained(tmp_path) if from_file else StellaConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("q", "v"), "exclude_modules": {"k"}, "modules_to_save": ("head",)},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": ["layers", "h"]},
        {"lora_alpha": 0.5, "lora_dropout": 0, "rank_pattern": None, "alpha_pattern": {r"^a\.b": 3.5}},
        {"layer_replication": ((0, 2), [1, 3]), "stella_grad_scaling": 64},
    ],
)
def test_every_right_type_is_taken(settings):
    config = StellaConfig(**settings)
    assert config.target_modules is None or isinstance(config.target_modules, str | set)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_warned_of(field):
    from peft import __version__ as installed

    if Version(installed) < Version("0.21"):
        pytest.skip("PEFT says nothing")
    with pytest.warns(RuntimeWarning, match=rf"{field} keys did not match any targeted module.*\['nowhere'\]"):
        adapted(Mlp(), r=2, target_modules=["up"], **{field: {"up": 3, "nowhere": 2}})


@pytest.mark.parametrize("retraction", ["polar", "exp_map", "qr", "cayley"])
@pytest.mark.parametrize("scaling", [True, False, 512, 0.5])
def test_file_round_trip(tmp_path, retraction, scaling):
    config = StellaConfig(
        r=5,
        target_modules=["q", "v"],
        rank_pattern={"q": 2},
        stella_retraction=retraction,
        stella_grad_scaling=scaling,
        layer_replication=[(0, 2), (1, 3)],
        init_lora_weights="svd_minor",
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "STELLA"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is StellaConfig
    for name in PUBLISHED:
        wanted = getattr(config, name)
        found = getattr(loaded, name)
        if name == "layer_replication":
            found = [tuple(pair) for pair in found]  # JSON has no tuples
        assert found == wanted, name
        assert type(found) is type(wanted), name

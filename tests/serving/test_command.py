"""``python -m stella_kernels export`` and ``import``: the same files as the functions write, and errors as messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft")

from safetensors.torch import load_file

from stella_kernels.__main__ import main
from stella_kernels.peft import save_as_lora
from tests.peft.models import llama, trained

WITHOUT_PEFT = """
import sys
sys.modules["peft"] = sys.modules["transformers"] = None  # importing them raises ImportError
from stella_kernels.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_export_and_import_need_neither_peft_nor_a_model(tmp_path, capsys):
    model = trained(llama(), rank_pattern={"q_proj": 8}, init_lora_weights="pseudo_zero")
    model.save_pretrained(tmp_path / "stella")
    arguments = ["export", str(tmp_path / "stella"), str(tmp_path / "lora"), "--rank-pattern", "--dtype", "bfloat16"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LoRA of rank 16 (layers have rank 8 to 16), 14 layers" in done.stdout
    save_as_lora(tmp_path / "by function", model, rank_pattern=True, dtype=torch.bfloat16)
    assert same(tensors(tmp_path / "lora"), tensors(tmp_path / "by function"))
    assert main(["import", str(tmp_path / "lora"), str(tmp_path / "back"), "--diagonal"]) == 0
    assert "StelLA adapter of rank 8, 16" in capsys.readouterr().out
    assert {t.dim() for key, t in tensors(tmp_path / "back").items() if "stella_S" in key} == {1}


def test_a_rank_is_a_number_or_a_share(tmp_path, capsys):
    trained(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "stella")
    for rank, wanted in (("2", {2}), ("1.0", {4})):
        assert main(["export", str(tmp_path / "stella"), str(tmp_path / rank), "--rank", rank]) == 0
        assert {len(t) for key, t in tensors(tmp_path / rank).items() if "lora_A" in key} == wanted
    assert main(["export", str(tmp_path / "stella"), str(tmp_path / "bad"), "--rank", "1.5"]) == 2
    assert "rank: found 1.5" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["export", "import"])
def test_what_cannot_be_done_is_a_message_and_status_2(tmp_path, capsys, command):
    assert main([command, str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"{command}: {tmp_path}: found no adapter_config.json" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

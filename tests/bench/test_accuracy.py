"""The accuracy study: its statistics, its schedule on a tiny task, and the tables of the runs that are kept."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.accuracy.command import RESULTS
from bench.accuracy.encoder import Block, Blocks
from bench.accuracy.run import LORA, METHODS, RATES, STELLA, Case, run
from bench.accuracy.schedule import SEEDS, best_rate, groups, rate_cases, work
from bench.accuracy.tables import mean_and_error, paired, read, scores, tables
from bench.accuracy.tasks import Task

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def synthetic() -> Task:
    """3 classes of random sequences, a block of width 16."""
    torch.manual_seed(0)
    block, y = Block(2, before=True, eps=1e-6, width=16, inner=32).requires_grad_(False), torch.arange(90) % 3
    x = torch.randn(90, 4, 16) + 2 * torch.randn(3, 16)[y][:, None]
    return Task("synthetic", x, None, y, 3, 40, (20, 20), lambda: Blocks([copy.deepcopy(block)], None))


def test_mean_and_standard_error() -> None:
    # deviations -1, 0, 1: variance 2 / (3 - 1) = 1, standard error 1 / sqrt(3)
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    # differences 1 and 3 over the seeds that both have: mean 2, deviation sqrt(2), error 1
    assert paired({0: 2.0, 1: 5.0, 7: 9.0}, {0: 1.0, 1: 2.0, 3: 0.0}) == pytest.approx((2.0, 1.0))
    assert math.isnan(mean_and_error([1.0])[1])


def test_the_best_rate_is_that_of_the_best_validation_score(tmp_path: Path) -> None:
    values = dict(zip(RATES, (0.1, 0.7, 0.9, 0.9, 0.2), strict=True))
    for case in rate_cases("task", "lora", 8):
        assert best_rate("task", "lora", 8, tmp_path) is None
        file = tmp_path / case.file
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"rate": case.rate, "score": values[case.rate]}))
    assert best_rate("task", "lora", 8, tmp_path) == RATES[2]  # the smaller of equals


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_a_tiny_task(method: str) -> None:
    task = synthetic()
    record = run(Case("synthetic", "test", method, 4, 3e-3, 0), task, steps=30)
    assert record["failed"] == ""
    assert record["curve"][-1] < record["curve"][0]


def test_the_schedule_goes_on_where_it_stopped(tmp_path: Path) -> None:
    task, chosen = synthetic(), groups(["synthetic"], ["lora", "stella"], [4])
    assert work(chosen, tmp_path, lambda name: task, minutes=0.0, steps=3) == 2 * len(RATES)
    assert best_rate("synthetic", "lora", 4, tmp_path) is None
    assert work(chosen, tmp_path, lambda name: task, steps=3) == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.json")}
    assert len(before) == 2 * (len(RATES) + len(SEEDS))
    assert work(chosen, tmp_path, lambda name: task, steps=3) == 0
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.json")}
    table = tables(tmp_path)
    assert "| synthetic | stella | 4 |" in table
    # made anew, a run gives the same
    kept = json.loads(min(before).read_text())
    again = run(Case(*(kept[key] for key in ("task", "stage", "method", "rank", "rate", "seed"))), task, steps=3)
    assert (again["score"], again["curve"]) == (kept["score"], kept["curve"])


def test_the_documents_table_is_that_of_the_runs() -> None:
    text = DOCUMENT.read_text()
    for line in tables(RESULTS).splitlines():
        assert line in text


def test_no_method_has_fewer_rates_or_seeds_than_ours() -> None:
    records = read(RESULTS)
    tasks = {r["task"] for r in records}
    assert len(tasks) >= 3
    for task in tasks:
        of = [m for m in METHODS if any((r["task"], r["method"]) == (task, m) for r in records)]
        assert len({*of} & {*LORA, *STELLA}) >= 4
        for method in of:
            rank = 0 if method in ("probe", "full") else 8
            assert set(scores(records, task, method, rank)) == set(SEEDS)
            tried = {r["rate"] for r in records if (r["task"], r["method"], r["stage"]) == (task, method, "rate")}
            assert tried == set(RATES)


COMPARISON = RESULTS.parent / "peft_method_comparison"
STAND_IN = """
import torch
def get_optimizer_and_scheduler(model, *, lr, weight_decay):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay), None
"""
STAND_IN_RUN = """
import json, sys
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from utils import get_optimizer_and_scheduler
torch.manual_seed(0)
config = PeftConfig.from_pretrained(sys.argv[1])
small = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(small), config)
parameters = json.load(open(sys.argv[1] + "/training_params.json"))
optimizer, _ = get_optimizer_and_scheduler(model, **parameters["optimizer_kwargs"])
ids = torch.arange(32)[None]
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
from stella_kernels.nn import stiefel_factors
identity = torch.eye(config.r)
print(len(stiefel_factors(model)), max(float((f.view.mT @ f.view - identity).norm()) for f in stiefel_factors(model)))
"""


def test_pefts_method_comparison_starts_with_the_geometry(tmp_path: Path) -> None:
    """Its own run.py needs a GPU and gated models: a stand-in with its functions' names."""
    (tmp_path / "utils.py").write_text(STAND_IN)
    (tmp_path / "run.py").write_text(STAND_IN_RUN)
    experiment = COMPARISON / "MetaMathQA" / "experiments" / "stella" / "llama-3.2-3B-rank32"
    command = [sys.executable, str(COMPARISON / "start.py"), str(experiment)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert ended.returncode == 0, ended.stderr
    factors, off = ended.stdout.split()[-2:]
    assert int(factors) == 4  # U and V of q and v
    assert float(off) < 1e-5


def test_pefts_image_comparison_has_a_valid_configuration() -> None:
    from stella_kernels.peft import StellaConfig

    found = StellaConfig.from_pretrained(
        str(COMPARISON / "image-gen" / "experiments" / "stella" / "flux2-klein-rank64")
    )
    assert (found.r, found.lora_alpha, found.init_lora_weights) == (64, 64, "zero")

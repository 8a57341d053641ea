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
from bench.accuracy.plots import mean_curve, save
from bench.accuracy.price import price
from bench.accuracy.run import LORA, METHODS, RATES, STELLA, Case, build, loss_of, run
from bench.accuracy.schedule import SEEDS, best_rate, groups, rate_cases, work
from bench.accuracy.spectra import compare, factors_of, participation, singular_values, turn
from bench.accuracy.tables import mean_and_error, paired, read, scores, tables
from bench.accuracy.tasks import Task
from bench.common.saved import saved_bytes

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


def test_singular_values_of_a_product_are_those_of_its_factors() -> None:
    torch.manual_seed(0)
    B, A = torch.randn(9, 4).double(), torch.randn(4, 7).double()
    # backward stable twice over: a few roundings of the largest of 4 values
    torch.testing.assert_close(singular_values(B, A), torch.linalg.svdvals(B @ A)[:4], rtol=1e-13, atol=1e-13)
    assert participation(torch.full((5,), 0.3)) == pytest.approx(5.0)
    assert participation(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1.0)


def test_a_turn_is_the_mean_squared_sine_of_principal_angles() -> None:
    start = torch.eye(5, 2).double()
    angle = 0.3
    turned = torch.stack(
        [start[:, 0] * math.cos(angle) + torch.eye(5)[:, 4].double() * math.sin(angle), start[:, 1]], 1
    )
    assert turn(start, turned @ torch.tensor([[2.0, 1.0], [0.0, 3.0]]).double()) == pytest.approx(
        math.sin(angle) ** 2 / 2
    )
    assert turn(torch.zeros(5, 2), start) is None


@pytest.mark.parametrize("method", ["lora", "pissa", "stella", "stella-diagonal"])
def test_what_a_run_did_to_its_adapters_is_that_of_the_dense_weights(method: str) -> None:
    model, optimizer = build(Case("synthetic", "test", method, 4, 3e-2, 0), task := synthetic())

    def products() -> dict[str, torch.Tensor]:
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        return {n: m.get_delta_weight("default").detach().double() for n, m in layers.items()}

    start, dense = factors_of(model), products()
    assert start.keys() == dense.keys()
    for _ in range(3):
        loss_of(task, model(task.x[:16], None), task.y[:16]).backward()
        optimizer.step()
    found, moved = compare(model, start), products()
    weights = {n: m.get_base_layer().weight.double() for n, m in model.named_modules() if n in start}
    change = [float((moved[n] - dense[n]).norm() / weights[n].norm()) for n in start]
    ranks = [participation(torch.linalg.svdvals(moved[n] - dense[n])) for n in start]
    # the dense products are rounded to float32, and what is compared to five places
    assert found["change"] == pytest.approx(sum(change) / len(change), rel=1e-3, abs=1e-5)
    assert found["change_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-2)
    assert ("turn_out" in found) == (method != "lora")


def test_what_is_kept_for_the_backward_pass_is_counted_once() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))

    def forward() -> torch.Tensor:
        # keeps its input, 128 bytes, and the weight, which is known
        hidden = torch.ones(4, 8, requires_grad=True) @ weight
        return hidden.exp().sum() + hidden.square().sum()  # keep the exponential and the product, 128 bytes each

    assert saved_bytes(forward, [weight])[1] == 3 * 4 * 8 * 4


def test_the_price_has_a_line_for_each_method() -> None:
    table = price(synthetic(), [("synthetic", "lora", 4), ("synthetic", "stella", 4), ("other", "dora", 4)], steps=4)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| lora", "| stella"]


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


def test_the_picture_is_of_the_runs(tmp_path: Path) -> None:
    task, chosen = synthetic(), groups(["synthetic"], ["lora", "stella"], [4])
    assert work(chosen, tmp_path, lambda name: task, steps=10) == 0
    records = read(tmp_path)
    curve, seconds = mean_curve(records, "synthetic", "stella", 4)
    tests = [r for r in records if (r["stage"], r["method"]) == ("test", "stella")]
    assert curve == pytest.approx([sum(r["curve"][i] for r in tests) / len(SEEDS) for i in range(2)])
    assert seconds == sorted(r["seconds_a_step"] for r in tests)[len(SEEDS) // 2]
    save(tmp_path, tmp_path / "new" / "picture.png", rank=4)
    assert (tmp_path / "new" / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_documents_table_is_that_of_the_runs() -> None:
    text = DOCUMENT.read_text()
    for line in tables(RESULTS).splitlines():
        assert line in text


def test_no_method_has_fewer_rates_or_seeds_than_ours() -> None:
    records = read(RESULTS)
    tasks = {r["task"] for r in records}
    assert len(tasks) >= 3
    for task in tasks:
        of = {(r["method"], r["rank"]) for r in records if r["task"] == task}
        assert len({method for method, rank in of if rank == 8} & {*LORA, *STELLA}) >= 4
        for method, rank in of:
            assert set(scores(records, task, method, rank)) == set(SEEDS)
            key = (task, method, rank, "rate")
            assert {r["rate"] for r in records if (r["task"], r["method"], r["rank"], r["stage"]) == key} == set(RATES)


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

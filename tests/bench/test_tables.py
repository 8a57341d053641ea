"""Every measuring function of the bench on the CPU, and on a GPU that is pretended: nothing is left on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import _judge
from bench.adapter import layer as adapter
from bench.adapter import model as adapter_model
from bench.common import device, roofline, shapes, timing
from bench.common.shapes import Case, ModelShapes
from bench.common.timing import Verdict
from bench.stiefel import compositions, model, polar, retract, step, step_memory
from bench.stiefel.published import svd_driver
from stella_kernels.nn import StiefelFactor
from tests.bench.pretended_gpu import GPU, OnGpu, pretended

ROOT = Path(__file__).parents[2]
SMALL = ModelShapes("small", hidden=24, mlp=40, key_value=12)
SHORT = 1e-9  # seconds: as few rounds as there may be
PROBES = {timing.PRODUCT, timing.COPY}


@pytest.fixture(params=["cpu", "cuda"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device, and everything small: a model's shapes, the probes."""
    for module in (model, roofline, step, step_memory):
        monkeypatch.setattr(module, "LLAMA_3_8B", SMALL)
    monkeypatch.setattr(shapes, "MAX_LAYERS_RANK", 8)
    for module in (retract, step):
        monkeypatch.setattr(module, "LAYERS", {4: 1})
    monkeypatch.setattr(timing, "_SIZE", {"cpu": 32, "cuda": 64})
    monkeypatch.setattr(timing, "_COPIED", {"cpu": 100, "cuda": 200})
    monkeypatch.setattr(adapter_model, "SMOLLM2_135M", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 50,
    })  # fmt: skip
    monkeypatch.setattr(adapter_model, "RANK", 4)
    monkeypatch.setattr(adapter_model, "BATCHES", {
        "cpu": adapter_model.Batch(2, 5, torch.float32), "cuda": adapter_model.Batch(3, 7, torch.bfloat16),
    })  # fmt: skip
    if request.param == "cuda":  # no events, no names and no allocator without a GPU
        monkeypatch.setattr(timing, "clock_of", lambda wanted: device.host_seconds)
        monkeypatch.setattr(timing, "description", lambda wanted: "a GPU")
        monkeypatch.setattr(timing, "three_of_tf32", lambda wanted: True)
    with pretended() if request.param == "cuda" else nullcontext():
        yield torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


def on(where: torch.device, value: Any) -> bool:
    return value.device == where and isinstance(value, OnGpu) == (where.type == "cuda")


def timed(samples: dict[str, list[float]]) -> bool:
    return all(len(values) >= timing.FEWEST_ROUNDS and min(values) > 0 for values in samples.values())


def untimed(verdicts: Iterable[Verdict]) -> list[str]:
    return [verdict.text for verdict in verdicts if not verdict.timed]


def writes_down(row: Any) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(row.as_dict()))
    return written


def test_machine(where: torch.device) -> None:
    probes = timing.machine_probes(where)
    assert set(probes) == PROBES
    assert all(on(where, run()) for run in probes.values())
    machine = timing.measure_machine(where)
    assert machine.flops > 0
    assert machine.bandwidth > 0
    assert str(machine).startswith("a GPU" if where.type == "cuda" else f"{torch.get_num_threads()} threads")
    samples = {timing.PRODUCT: [2.0, 1.0], timing.COPY: [4.0, 2.0]}
    size, copied = (64, 200) if where.type == "cuda" else (32, 100)
    assert timing.machine_of(samples, where).flops == 2.0 * size**3 / (3 if where.type == "cuda" else 1)
    assert timing.machine_of(samples, where).bandwidth == 4.0 * copied


def test_a_gpu_is_probed_by_tf32_products(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, mm, before = [], torch.mm, torch.get_float32_matmul_precision()

    def watched(*arguments: Any, **named: Any) -> Any:
        asked.append(torch.get_float32_matmul_precision())
        return mm(*arguments, **named)

    monkeypatch.setattr(torch, "mm", watched)
    timing.machine_probes(where)[timing.PRODUCT]()
    assert asked == ["high" if where.type == "cuda" else before]
    assert torch.get_float32_matmul_precision() == before


def test_polar(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(polar, "polar", lambda M: given.append(M) or compositions.gram_eigh(M))
    row = polar.measure(Case(3, 40, 4, ("small",)), timing.measure_machine(where), SHORT, where)
    assert given
    assert all(on(where, M) for M in given)
    assert set(row.seconds) == {"native", "qr", *compositions.POLAR}
    # of float32, summed over 40 rows; gram_eigh, which stands in, squares a condition of about 1
    assert 0 < row.native_error < 100 * torch.finfo(torch.float32).eps
    assert 0 < row.svd_error < 100 * torch.finfo(torch.float32).eps
    assert writes_down(row)
    assert "3 × 40 × 4" in polar.table_row(row)
    (error,) = untimed(polar.verdicts([row]))
    assert error.startswith("error")


def test_polar_factor_itself(where: torch.device) -> None:
    row = polar.measure(Case(3, 40, 4, ("small",)), timing.measure_machine(where), SHORT, where)
    assert 0 < row.native_error < 100 * torch.finfo(torch.float32).eps


def test_factors_are_the_same_everywhere(where: torch.device) -> None:
    factors = model.llama_factors(2, 4, torch.Generator().manual_seed(1), where)
    on_cpu = model.llama_factors(2, 4, torch.Generator().manual_seed(1))
    copied = model.copies(factors)
    for factor, copy, same in zip(factors, copied, on_cpu, strict=True):
        for one, another, known in (
            (factor.parameter, copy.parameter, same.parameter),
            (factor.parameter.grad, copy.parameter.grad, same.parameter.grad),
        ):
            assert on(where, one)
            assert on(where, another)
            assert one.data_ptr() != another.data_ptr()
            assert torch.equal(one.detach().cpu(), known)
            assert torch.equal(another.detach().cpu(), known)


def test_retract(where: torch.device) -> None:
    row = retract.measure(4, SHORT, where)
    assert row.layers == (2 if where.type == "cuda" else 1)
    assert set(row.samples) == {"native", *compositions.RETRACT}
    assert timed(row.samples)
    assert writes_down(row)
    assert retract.table_row(row)
    assert not untimed(retract.verdicts([row]))


def test_step(where: torch.device) -> None:
    row = step.measure(4, SHORT, False, where)
    assert 0.0 < row.guard < 1.0
    assert row.layers == (2 if where.type == "cuda" else 1)
    assert set(row.samples) == set(model.OPTIMIZERS)
    assert timed(row.samples)
    assert math.isnan(row.extra_memory("attach"))
    assert writes_down(row)
    assert step.table_row(row)


def test_memory_of_a_step(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = 2 * 4 * 3 * SMALL.rows * 4  # float32, of three layers

    def peak(wanted: torch.device, run: Callable[[], object]) -> int:
        assert wanted == where
        run()
        return 1000 + moments

    def watched(name: str) -> Callable[..., torch.optim.Optimizer]:
        def build(factors: list[StiefelFactor]) -> torch.optim.Optimizer:
            assert all(on(where, f.parameter) for f in factors)  # of the small model that warms up too
            return model.OPTIMIZERS[name](factors)

        return build

    monkeypatch.setattr(step_memory, "OPTIMIZERS", {name: watched(name) for name in model.OPTIMIZERS})
    monkeypatch.setattr(step_memory, "peak_bytes", peak)
    for name in model.OPTIMIZERS:
        assert step_memory.extra_bytes(name, 3, 4, where) == 1000
    monkeypatch.setattr(step, "MEMORY_LAYERS", {4: 3} if where.type == "cuda" else {})  # a CPU's takes new processes
    row = step.measure(4, SHORT, True, where)
    assert row.extra_bytes == (dict.fromkeys(model.OPTIMIZERS, 1000) if where.type == "cuda" else {})
    assert step.table_row(row)
    assert len(untimed(step.verdicts([row]))) == bool(row.extra_bytes)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter(where: torch.device, dropout: float, dtype: torch.dtype) -> None:
    case = adapter.Case(20, 12, 16, 4, dropout, dtype)
    given = adapter.problem(case, device=where)
    for layer in given.layers.values():
        assert all(on(where, parameter) for parameter in layer.parameters())
    for name in given.layers:
        assert all(on(where, gradient) for gradient in given.step(name))
    row = adapter.measure(case, SHORT, where)
    assert set(row.samples) == set(adapter.LAYERS)
    assert timed(row.samples)
    # A (T, r) alone, float32: no mask, nothing of the size of x
    assert row.saved["ours"] <= 2 * 4 * 20 * 4
    assert row.saved["lora"] > 0
    assert writes_down(row)
    assert adapter.table_row(row)
    (kept,) = untimed(adapter.verdicts([row]))
    assert "keeps" in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_an_adapter_are_in_half_precision_on_a_gpu_as_trainers_have_them(
    where: torch.device, dtype: torch.dtype
) -> None:
    given = adapter.problem(adapter.Case(20, 12, 16, 4, 0.0, dtype), device=where)
    made: list[torch.dtype] = []
    for name, linear in (("lora", "lora_A.default"), ("published", "Vt")):
        given.layers[name].get_submodule(linear).register_forward_hook(lambda *call: made.append(call[-1].dtype))
        given.step(name)
    assert made == [dtype if where.type == "cuda" else torch.float32] * 2
    assert all(given.forward(name).dtype == dtype for name in given.layers)
    assert ("autocast" in adapter.title(where)) == (where.type == "cuda")


def test_more_cases_of_the_adapter_on_a_gpu() -> None:
    added = set(adapter.cases(False, GPU)) - set(adapter.cases())
    assert {case.dtype for case in added} == {torch.bfloat16}
    assert {(case.m, case.n) for case in added} == {adapter.LARGE}


@pytest.mark.parametrize("dropout", adapter_model.DROPOUTS)
def test_training_step(where: torch.device, dropout: float) -> None:
    row = adapter_model.measure(dropout, SHORT, False, where)
    assert set(row.samples) == set(adapter_model.TRAININGS)
    assert timed(row.samples)
    assert writes_down(row)
    assert "not measured" in adapter_model.table_row(row)
    assert ("bfloat16 under torch.autocast," if where.type == "cuda" else "float32,") in adapter_model.title(where)


def test_products_of_a_training_step_are_in_half_precision_on_a_gpu(
    where: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.dtype] = []

    def watched(dropout: float, wanted: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        built, optimizer = adapter_model._lora(dropout, wanted)
        for name, module in built.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *call: made.append(call[-1].dtype))
        return built, optimizer

    monkeypatch.setattr(adapter_model, "TRAININGS", {"lora": watched})
    adapter_model.training_step("lora", 0.0, where)()
    assert made == [torch.bfloat16 if where.type == "cuda" else torch.float32] * 2 * len(adapter_model.PROJECTIONS)


def test_memory_of_a_training_step(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_model, "peak_bytes", lambda wanted, run: (run(), 7 * 2**20)[1])
    for name in adapter_model.TRAININGS:
        assert adapter_model.peak_bytes_of_step(name, 0.0, where) == 7 * 2**20
    if where.type == "cuda":  # a CPU's takes new processes
        row = adapter_model.measure(0.0, SHORT, True, where)
        assert "7 MiB, 7 MiB" in adapter_model.table_row(row)
        (memory,) = untimed(adapter_model.verdicts([row]))
        assert "peak memory" in memory


def test_of_a_gpu_all_promises_but_those_about_time_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    slow, large = Verdict(False, "slow"), Verdict(False, "large", timed=False)
    assert not _judge([slow], device.CPU)
    assert not _judge([large], device.CPU)
    assert _judge([slow], GPU)
    capsys.readouterr()
    assert not _judge([slow, large], GPU)
    printed = capsys.readouterr().out
    assert "MISSED  large" in printed
    assert "slow" not in printed


def test_the_pretended_gpu_refuses_what_was_left_on_the_cpu() -> None:
    with pretended() as gpu:
        x = torch.ones(2, 3, device=gpu)
        with pytest.raises(RuntimeError, match=r"aten::add.*cuda:0.*\(2, 3\).*CPU"):
            x + torch.ones(2, 3)
        assert on(gpu, x + torch.tensor(1.0))
        assert not isinstance(x.cpu(), OnGpu)


def test_published_driver_of_the_svd() -> None:
    assert svd_driver(torch.ones(2, 2)) is None
    with pretended() as gpu:
        assert svd_driver(torch.ones(2, 2, device=gpu)) == "gesvda"


def test_rounds_of_a_gpu_begin_after_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled in it, for longer than a row is timed."""
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "clock_of", lambda wanted: lambda run: run())

    def run() -> float:
        now[0] += 100.0 if now[0] == 0.0 else 0.1
        return 0.1

    assert len(timing.interleaved_samples({"a": run}, 1.0, device=GPU)["a"]) in (10, 11, 12)  # 1 s, of 0.1 s each
    now[0] = 0.0
    assert len(timing.interleaved_samples({"a": run}, 1.0)["a"]) == timing.FEWEST_ROUNDS


def test_tables_that_need_no_model_import_no_model_library() -> None:
    code = "import sys, bench.__main__; from bench.stiefel import plot, polar, retract, step; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"peft", "transformers", "torchao"} & set(done.stdout.split())

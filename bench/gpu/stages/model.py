"""A whole training step of SmolLM2-135M's shape: StelLA with StellaAdamW against LoRA with torch's fused AdamW."""

from __future__ import annotations

import gc
import statistics

import torch

from bench.adapter.lora import lora_is
from bench.common.device import peak_bytes
from bench.common.timing import interleaved_samples, paired_ratio
from bench.gpu.setting import Setting, attempt
from bench.gpu.training import ADAPTERS, Problem, libraries, problem_on, training_step

# how, dropout, and the seconds that it takes at least on a GPU: compiling alone
RUNS = (("eager", 0.0, 5.0), ("eager", 0.05, 5.0), ("graph", 0.0, 5.0), ("compiled", 0.0, 20.0))


def run(setting: Setting) -> None:
    """A row for each way of running it that there is time for."""
    problem = problem_on(setting.device, setting.rehearse)
    if why_not := libraries():
        setting.note(f"the model is one of plain torch: {why_not}")
    setting.note(
        f"LoRA is {lora_is() if not libraries() or 'peft' in libraries() else 'that of bench/adapter/lora.py'}"
    )
    for index, (mode, dropout, least) in enumerate(RUNS):
        name = f"{mode}, dropout {dropout:g}"
        if setting.left < (0.0 if setting.rehearse else least):
            setting.missing(f"{name} and {len(RUNS) - index - 1} more: no time left")
            break
        seconds = min(5.0, 0.3 * setting.left / (len(RUNS) - index))
        attempt(setting, name, lambda m=mode, d=dropout, s=seconds: _measure(setting, problem, m, d, s))


def _measure(setting: Setting, problem: Problem, mode: str, dropout: float, seconds: float) -> None:
    steps = {name: training_step(name, mode, dropout, problem) for name in ADAPTERS}
    samples = interleaved_samples(steps, seconds, device=problem.device)
    peaks = {}
    if problem.device.type == "cuda":
        peaks = {name: peak_bytes(problem.device, step) for name, step in steps.items()}
    ratio = paired_ratio(samples, "ours", "lora")
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    setting.record(
        "model", mode=mode, dropout=dropout, sequences=problem.sequences, tokens=problem.tokens, rank=problem.rank,
        dtype=str(problem.dtype).removeprefix("torch."), seconds=medians, samples=samples, ours_over_lora=ratio,
        peak_bytes=peaks,
    )  # fmt: skip
    times = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in medians.items())
    print(f"{mode:>9} dropout {dropout:g}: {times}, ours / LoRA {ratio:.3f}", flush=True)
    del steps
    torch._dynamo.reset()
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()

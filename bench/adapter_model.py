"""A whole training step of a model of SmolLM2-135M's shape: StelLA with StellaAdamW against LoRA with torch's AdamW.

``python -m bench.adapter_model NAME DROPOUT`` prints the peak memory of one step in bytes, measured in a process of its
own (Linux): the kernel's high-water mark of resident memory over the second step, less what was resident before it.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from bench.timing import interleaved_samples, paired_ratio
from stella_kernels.optim import StellaAdamW
from stella_kernels.peft import StellaConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, BATCH, TOKENS = 16, 16, 48  # the demo's
DROPOUTS = (0.0, 0.05)
WANTED_OVER_LORA = 1.02  # times the step with LoRA, at most
WANTED_MEMORY = 1.02  # times its peak memory, at most: resident memory differs by that from run to run
MEASURES_MEMORY = Path("/proc/self/clear_refs").exists()
_STATUS = Path("/proc/self/status")


def _base() -> LlamaForCausalLM:
    """SmolLM2-135M with random weights: what they are does not change the time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _lora(dropout: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=PROJECTIONS)
    model = get_peft_model(_base(), settings)
    return model, torch.optim.AdamW(_trained(model), lr=1e-3, weight_decay=0.0, fused=True)


def _ours(dropout: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = StellaConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=PROJECTIONS)
    model = get_peft_model(_base(), settings)
    return model, StellaAdamW(model, lr=1e-3, weight_decay=0.0)


TRAININGS: dict[str, Callable[[float], tuple[nn.Module, torch.optim.Optimizer]]] = {"lora": _lora, "ours": _ours}


def training_step(name: str, dropout: float) -> Callable[[], object]:
    """One step of training: forward, backward, optimizer."""
    model, optimizer = TRAININGS[name](dropout)
    model.train()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(49152, (BATCH, TOKENS), generator=generator)
    answers = torch.randint(49152, (BATCH,), generator=generator)

    def step() -> None:
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        cross_entropy(logits, answers).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclass(frozen=True)
class Row:
    """One dropout: seconds of each training's steps, and the peak bytes of one, NaN where that is not measured."""

    dropout: float
    samples: dict[str, list[float]]
    peak_bytes: dict[str, int]

    @property
    def over_lora(self) -> float:
        return paired_ratio(self.samples, "ours", "lora")

    def as_dict(self) -> dict[str, object]:
        """The row as plain JSON types."""
        return {
            "dropout": self.dropout,
            "samples": self.samples,
            "ours_over_lora": self.over_lora,
            "peak_bytes": self.peak_bytes,
        }


def measure(dropout: float, seconds: float, memory: bool) -> Row:
    """Time both trainings for about ``seconds`` in all, then measure their memory."""
    samples = interleaved_samples({name: training_step(name, dropout) for name in TRAININGS}, seconds)
    peaks = {name: _measure_peak_bytes(name, dropout) for name in TRAININGS} if memory and MEASURES_MEMORY else {}
    return Row(dropout, samples, peaks)


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


def _peak_bytes(name: str, dropout: float) -> int:
    step = training_step(name, dropout)
    step()  # the optimizer's state, pools of threads, scratch
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _measure_peak_bytes(name: str, dropout: float) -> int:
    command = [sys.executable, "-m", "bench.adapter_model", name, str(dropout)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout.splitlines()[-1])


TITLE = (
    f"A whole training step (forward, backward, optimizer) of SmolLM2-135M's shape, {BATCH} × {TOKENS} tokens, "
    f"float32,\nr = {RANK} on 7 projections: StelLA with StellaAdamW against PEFT's LoRA with torch's AdamW (fused)."
)
HEADER = f"{'drop':>5} | {'LoRA':>11} {'StelLA':>11} {'ours/LoRA':>9} | peak memory of a step: LoRA, StelLA"


def table_row(row: Row) -> str:
    """One line of the table on the terminal."""
    times = " ".join(f"{1e3 * statistics.median(row.samples[name]):8.1f} ms" for name in TRAININGS)
    peaks = ", ".join(f"{row.peak_bytes[name] / 2**20:.0f} MiB" for name in row.peak_bytes) or "not measured"
    return f"{row.dropout:5g} | {times} {row.over_lora:9.3f} | {peaks}"


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[bool, str]]:
    """What the package promises of a whole step, each with whether this run bore it out."""
    for row in rows:
        where = f"whole step, dropout {row.dropout:g}"
        found = row.over_lora
        yield found <= WANTED_OVER_LORA, f"{where}: {found:.3f} × LoRA's, wanted at most {WANTED_OVER_LORA:g}"
        if row.peak_bytes:
            memory = row.peak_bytes["ours"] / row.peak_bytes["lora"]
            yield (
                memory <= WANTED_MEMORY,
                f"{where}: peak memory {memory:.3f} × LoRA's, wanted at most {WANTED_MEMORY:g}",
            )


if __name__ == "__main__":
    print(_peak_bytes(sys.argv[1], float(sys.argv[2])))

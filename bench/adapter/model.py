"""A whole training step of a model of SmolLM2-135M's shape: StelLA with StellaAdamW against LoRA with torch's AdamW.

``python -m bench.adapter.model NAME DROPOUT`` prints the peak memory of one step on the CPU in bytes, measured in a
process of its own (Linux): how far memory rises over the second step.
"""

from __future__ import annotations

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

from bench.common.device import CPU, as_trained, measures_memory, peak_bytes
from bench.common.timing import Verdict, interleaved_samples, milliseconds, paired_ratio
from stella_kernels.optim import StellaAdamW
from stella_kernels.peft import StellaConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16  # the demo's
DROPOUTS = (0.0, 0.05)
WANTED_OVER_LORA = 1.02  # times the step with LoRA, at most
WANTED_MEMORY = 1.02  # times its peak memory, at most: resident memory differs by that from run to run

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Batch:
    """What a step trains on: so many sequences, and the dtype of the frozen weights."""

    sequences: int
    tokens: int
    dtype: torch.dtype


# The demo's on a CPU; a GPU would wait for its launches all the time of that.
BATCHES = {"cpu": Batch(16, 48, torch.float32), "cuda": Batch(16, 512, torch.bfloat16)}


def _base(device: torch.device) -> LlamaForCausalLM:
    """SmolLM2-135M with random weights: what they are does not change the time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).requires_grad_(False)
    return model.to(device, BATCHES[device.type].dtype)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _lora(dropout: float, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=PROJECTIONS)
    model = get_peft_model(_base(device), settings)
    return model, torch.optim.AdamW(_trained(model), lr=1e-3, weight_decay=0.0, fused=True)


def _ours(dropout: float, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = StellaConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=PROJECTIONS)
    model = get_peft_model(_base(device), settings)
    return model, StellaAdamW(model, lr=1e-3, weight_decay=0.0)


TRAININGS: dict[str, Callable[[float, torch.device], tuple[nn.Module, torch.optim.Optimizer]]] = {
    "lora": _lora,
    "ours": _ours,
}


def training_step(name: str, dropout: float, device: torch.device) -> Callable[[], object]:
    """One step of training: forward, backward, optimizer."""
    model, optimizer = TRAININGS[name](dropout, device)
    model.train()
    generator, batch = torch.Generator().manual_seed(1), BATCHES[device.type]
    words = SMOLLM2_135M["vocab_size"]
    tokens = torch.randint(words, (batch.sequences, batch.tokens), generator=generator).to(device)
    answers = torch.randint(words, (batch.sequences,), generator=generator).to(device)

    def step() -> None:
        with as_trained(device, batch.dtype):
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
            loss = cross_entropy(logits, answers)
        loss.backward()
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


def measure(dropout: float, seconds: float, memory: bool, device: torch.device = CPU) -> Row:
    """Time both trainings for about ``seconds`` in all, then measure their memory."""
    samples = interleaved_samples(
        {name: training_step(name, dropout, device) for name in TRAININGS}, seconds, device=device
    )
    measured = TRAININGS if memory and measures_memory(device) else ()
    return Row(dropout, samples, {name: _measure_peak_bytes(name, dropout, device) for name in measured})


def peak_bytes_of_step(name: str, dropout: float, device: torch.device) -> int:
    """How far memory rises in the second step of a training, in this process."""
    step = training_step(name, dropout, device)
    step()  # the optimizer's state, pools of threads, scratch
    return peak_bytes(device, step)


def _measure_peak_bytes(name: str, dropout: float, device: torch.device) -> int:
    if device.type == "cuda":  # of which torch counts what it hands out
        return peak_bytes_of_step(name, dropout, device)
    command = [sys.executable, "-m", "bench.adapter.model", name, str(dropout)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return int(done.stdout.splitlines()[-1])


HEADER = f"{'drop':>5} | {'LoRA':>11} {'StelLA':>11} {'ours/LoRA':>9} | peak memory of a step: LoRA, StelLA"


def title(device: torch.device) -> str:
    """What the table is of."""
    batch, how = BATCHES[device.type], " under torch.autocast" if device.type == "cuda" else ""
    return (
        f"A whole training step (forward, backward, optimizer) of SmolLM2-135M's shape, {batch.sequences} × "
        f"{batch.tokens} tokens, {str(batch.dtype).removeprefix('torch.')}{how},\n"
        f"r = {RANK} on 7 projections: StelLA with StellaAdamW against PEFT's LoRA with torch's AdamW (fused)."
    )


def table_row(row: Row) -> str:
    """One line of the table on the terminal."""
    times = " ".join(f"{milliseconds(statistics.median(row.samples[name]), 8, 1)} ms" for name in TRAININGS)
    peaks = ", ".join(f"{row.peak_bytes[name] / 2**20:.0f} MiB" for name in row.peak_bytes) or "not measured"
    return f"{row.dropout:5g} | {times} {row.over_lora:9.3f} | {peaks}"


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """What the package promises of a whole step, each with whether this run bore it out."""
    for row in rows:
        where = f"whole step, dropout {row.dropout:g}"
        found = row.over_lora
        yield Verdict(found <= WANTED_OVER_LORA, f"{where}: {found:.3f} × LoRA's, wanted at most {WANTED_OVER_LORA:g}")
        if row.peak_bytes:
            memory = row.peak_bytes["ours"] / row.peak_bytes["lora"]
            yield Verdict(
                memory <= WANTED_MEMORY,
                f"{where}: peak memory {memory:.3f} × LoRA's, wanted at most {WANTED_MEMORY:g}",
                timed=False,
            )


if __name__ == "__main__":
    print(peak_bytes_of_step(sys.argv[1], float(sys.argv[2]), CPU))

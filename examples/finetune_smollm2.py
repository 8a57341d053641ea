"""Fine-tune SmolLM2-135M with StelLA through PEFT, LoRA beside it, and see what the geometry costs: ``make demo``.

The model learns to continue "Review: …\\nSentiment:" with " positive" or " negative" on movie reviews rated by people.
Every promise is checked at the end; the exit status says whether all held.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bench.stiefel.published import PublishedGeometry
from examples.movie_reviews import Prompts, Review, load_reviews, random_batches, split
from examples.smollm2 import load_smollm2
from examples.step_clock import Split, StepClock
from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW
from stella_kernels.peft import StellaConfig
from stella_kernels.reference.stiefel import orthonormality_error

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
BATCH = 16
MAX_REVIEW_TOKENS = 40
EVALUATION_BATCH = 32
COMPARED_PROMPTS = 8
WANTED_RATIO = 5.0
TURN = 3  # timed steps in a row: the first after another optimizer's measures the factors that were moved meanwhile


@dataclass(frozen=True)
class Way:
    """A model, what moves it, and the times of its steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clock: StepClock = field(default_factory=StepClock)


def answer_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the token after each prompt, (B, vocabulary)."""
    return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def evaluate(model: nn.Module, reviews: Sequence[Review], prompts: Prompts, title: str) -> tuple[float, float]:
    """Mean loss of the answer token, and how often the right answer gets the higher logit of the two."""
    model.eval()
    ordered = sorted(reviews, key=lambda review: len(review.text))  # similar lengths in a batch: little padding
    loss, right = 0.0, 0
    for start in tqdm(range(0, len(ordered), EVALUATION_BATCH), desc=title, unit="batch"):
        inputs, labels = prompts.batch(ordered[start : start + EVALUATION_BATCH])
        logits = answer_logits(model, inputs)
        loss += float(cross_entropy(logits, prompts.answer_tokens[labels], reduction="sum"))
        right += int((logits[:, prompts.answer_tokens].argmax(1) == labels).sum())
    return loss / len(ordered), right / len(ordered)


def train(
    ways: Sequence[Way],
    batches: Iterator[list[Review]],
    prompts: Prompts,
    steps: int,
    title: str,
) -> float:
    """Take ``steps`` steps, ``TURN`` in each way by turns; return the largest ``‖QᵀQ − I‖`` that a factor showed after
    any of them."""
    largest = 0.0
    with tqdm(range(steps), desc=title, unit="step") as progress:
        for step in progress:
            way = ways[step // TURN % len(ways)]
            way.model.train()
            inputs, labels = prompts.batch(next(batches))
            way.clock.start()
            loss = cross_entropy(answer_logits(way.model, inputs), prompts.answer_tokens[labels])
            loss.backward()
            way.optimizer.step()
            way.clock.finish()
            way.optimizer.zero_grad()
            for factor in stiefel_factors(way.model):
                largest = max(largest, float(orthonormality_error(factor.view.double())))
            progress.set_postfix(loss=f"{loss.item():.3f}", orthonormality=f"{largest:.1e}")
    return largest


@torch.no_grad()
def float32_round_off(merged: nn.Module, inputs: dict[str, Tensor], logits: Tensor) -> float:
    """How far the float32 logits of a merged model are from the same model's in float64."""
    return float((answer_logits(copy.deepcopy(merged).double(), inputs) - logits).abs().max())


def split_line(name: str, part: Split) -> str:
    """One line of the table of times."""
    return (
        f"  {name:<24} {1e3 * part.forward_backward:13.1f} ms {1e3 * part.optimizer:9.1f} ms"
        f" {1e3 * part.geometry:9.2f} ms {1e3 * part.total:9.1f} ms"
    )


def main() -> int:
    """Run the demo; 0 where every promise held."""
    parser = argparse.ArgumentParser(prog="python -m examples.finetune_smollm2", description=__doc__)
    parser.add_argument("--reviews", type=Path, default=Path(".cache/vaderSentiment-3.3.2.tar.gz"))
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the adapter is saved")
    parser.add_argument("--steps", type=int, default=40, help="of StelLA, and of LoRA")
    parser.add_argument("--timed-steps", type=int, default=6, help="timed of each way")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(arguments.seed)

    print("SmolLM2-135M on movie reviews, with StelLA and LoRA; four to ten minutes on two cores.", flush=True)
    reviews, held_out = split(load_reviews(arguments.reviews), arguments.held_out, arguments.seed)
    base, tokenizer = load_smollm2()
    fresh_base, lora_base = copy.deepcopy(base), copy.deepcopy(base)  # PEFT changes the model it is given
    prompts = Prompts(tokenizer, MAX_REVIEW_TOKENS)
    loss_before, accuracy_before = evaluate(base, held_out, prompts, "held out, before")

    model = get_peft_model(base, StellaConfig(r=RANK, lora_alpha=arguments.alpha, target_modules=PROJECTIONS))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = StellaAdamW(model, lr=arguments.learning_rate, weight_decay=0.0, fused=True)
    print(f"{len(reviews)} reviews, {sum(p.numel() for p in trainable) / 1e6:.1f} M trained parameters", flush=True)

    stella = Way(model, optimizer)
    with stella.clock.around(optimizer):
        pass  # StellaAdamW has no hooks: one call does both, and is timed as the optimizer
    batches = random_batches(reviews, BATCH, arguments.seed)
    orthonormality = train([stella], batches, prompts, arguments.steps, "StelLA")
    loss_after, accuracy_after = evaluate(model, held_out, prompts, "held out, after")

    # at the rate where each was best when several were tried on this task: the same
    lora_config = LoraConfig(r=RANK, lora_alpha=arguments.alpha, target_modules=PROJECTIONS)
    lora_model = get_peft_model(lora_base, lora_config)
    lora_trainable = [p for p in lora_model.parameters() if p.requires_grad]
    lora = Way(lora_model, torch.optim.AdamW(lora_trainable, arguments.learning_rate, weight_decay=0.0, fused=True))
    with lora.clock.around(lora.optimizer):
        pass
    train([lora], random_batches(reviews, BATCH, arguments.seed), prompts, arguments.steps, "LoRA, the same batches")
    lora_loss, lora_accuracy = evaluate(lora_model, held_out, prompts, "held out, LoRA")

    inputs, _ = prompts.batch(held_out[:COMPARED_PROMPTS])
    model.save_pretrained(arguments.output)
    with torch.no_grad():
        logits = answer_logits(model, inputs)
        loaded = PeftModel.from_pretrained(fresh_base, arguments.output).eval()
        loaded_logits = answer_logits(loaded, inputs)
        merged = loaded.merge_and_unload()
        merged_logits = answer_logits(merged, inputs)
    # Trained and merged are two float32 evaluations of one function, each off by about this round-off, and merging
    # rounds every weight once more: 3 in all, and another for a maximum that differs from one evaluation to the next.
    tolerance = 4 * float32_round_off(merged, inputs, merged_logits)
    loaded_difference = float((loaded_logits - logits).abs().max())
    merged_difference = float((merged_logits - logits).abs().max())

    adamw = torch.optim.AdamW(trainable, lr=arguments.learning_rate, weight_decay=0.0, fused=True)
    as_published = Way(model, adamw)
    with as_published.clock.around(adamw):
        published_geometry = PublishedGeometry(adamw, stiefel_factors(model), model.config.hidden_size)
    stella.clock.forget()
    lora.clock.forget()
    ways = [stella, as_published, lora]  # by turns, so that what else the machine does slows all
    train(ways, batches, prompts, len(ways) * arguments.timed_steps, "StelLA, StelLA as published, LoRA")
    fused, published = stella.clock.median(), as_published.clock.median()
    published_geometry.remove()
    # What the geometry adds to AdamW: the fused step less torch's fused AdamW on the same parameters.
    native = Split(fused.forward_backward, published.optimizer, fused.optimizer - published.optimizer)
    if native.geometry > 0.0:
        gain = f"geometry {published.geometry / native.geometry:.1f} times cheaper than as published"
    else:
        gain = "geometry lost in the noise of this machine, no slower than AdamW alone"

    # Rounding each entry of an exact Q to float32 moves QᵀQ by up to eps sqrt(r); the kernel's own sums take some more.
    manifold_tolerance = 10 * torch.finfo(torch.float32).eps * math.sqrt(RANK)
    print(f"\nheld out ({len(held_out)} reviews)   before    StelLA      LoRA   ({arguments.steps} steps, r = {RANK})")
    print(f"  loss                 {loss_before:9.3f} {loss_after:9.3f} {lora_loss:9.3f}")
    print(f"  accuracy             {accuracy_before:9.3f} {accuracy_after:9.3f} {lora_accuracy:9.3f}")
    print("\none step (medians)         forward+backward    optimizer     geometry        total")
    print(split_line("StellaAdamW", native))
    print(split_line("AdamW, as published", published))
    print(split_line("LoRA with AdamW", lora.clock.median()))
    print("  (StellaAdamW takes both in one call; its geometry is its time less that of torch's AdamW)")
    print(f"  {gain} (batched torch.linalg.svd)\n")
    print(f"adapter saved to {arguments.output}; {time.perf_counter() - began:.0f} s in all\n")
    checks = [
        (loss_after < loss_before, f"held-out loss fell: {loss_before:.3f} to {loss_after:.3f}"),
        (accuracy_after > accuracy_before, f"held-out accuracy rose: {accuracy_before:.3f} to {accuracy_after:.3f}"),
        (
            orthonormality <= manifold_tolerance,
            f"largest ‖UᵀU − I‖ over the run, U and V: {orthonormality:.1e}, tolerance {manifold_tolerance:.1e}",
        ),
        (published.geometry >= WANTED_RATIO * native.geometry, f"{gain}, wanted {WANTED_RATIO:g}"),
        (
            loaded_difference <= tolerance,
            f"logits of the loaded adapter differ by {loaded_difference:.1e}, tolerance {tolerance:.1e}",
        ),
        (
            merged_difference <= tolerance,
            f"logits of the merged model differ by {merged_difference:.1e}, tolerance {tolerance:.1e}",
        ),
    ]
    for held, text in checks:
        print(f"{'ok    ' if held else 'FAILED'}  {text}")
    return int(not all(held for held, _ in checks))


if __name__ == "__main__":
    sys.exit(main())

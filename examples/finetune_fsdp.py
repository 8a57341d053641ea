"""Fine-tune SmolLM2-135M with StelLA on several processes, its base and its adapters sharded by FSDP2.

    torchrun --nproc-per-node 2 -m examples.finetune_fsdp --steps 10          # trains, and saves a checkpoint
    torchrun --nproc-per-node 1 -m examples.finetune_fsdp --steps 20 --resume # goes on from it, on one
    torchrun --nproc-per-node 2 -m examples.finetune_fsdp --steps 20 --resume --whole-adapters

Nothing here is special to StelLA but ``shard_placement``, which has Vᵀ split by rows of V. With ``--whole-adapters``
only the base is sharded. The adapter is written at the end as PEFT writes it, for one device. Runs on CPUs by gloo, and
on GPUs where there are any.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from examples.finetune_smollm2 import BATCH, MAX_REVIEW_TOKENS, PROJECTIONS, RANK, answer_logits
from examples.movie_reviews import Prompts, load_reviews, random_batches, split
from examples.smollm2 import load_smollm2
from stella_kernels.diagnostics import orthonormality
from stella_kernels.distributed import shard_base, shard_placement
from stella_kernels.optim import StellaAdamW
from stella_kernels.peft import StellaConfig

TRAINED = StateDictOptions(ignore_frozen_params=True)  # of a checkpoint: the base comes from where it came from


def main() -> int:
    """Train, save, export; 0 where the factors ended orthonormal."""
    parser = argparse.ArgumentParser(prog="python -m examples.finetune_fsdp", description=__doc__.partition("\n")[0])
    parser.add_argument("--reviews", type=Path, default=Path(".cache/vaderSentiment-3.3.2.tar.gz"))
    parser.add_argument("--output", type=Path, default=Path("demo-output/fsdp"))
    parser.add_argument("--steps", type=int, default=10, help="in all, those of a checkpoint counted")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--whole-adapters", action="store_true", help="shard the base alone")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())

    torch.manual_seed(0)  # the adapter starts alike on all processes
    base, tokenizer = load_smollm2()
    model = get_peft_model(base, StellaConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS)).to(device)
    layers = list(base.model.layers)
    if arguments.whole_adapters:
        shard_base(model, layers)
    else:
        place = shard_placement(model)
        for layer in (*layers, model):
            fully_shard(layer, shard_placement_fn=place)
    optimizer = StellaAdamW(model, lr=arguments.learning_rate, weight_decay=0.0)

    checkpoint, first = arguments.output / "checkpoint", 0
    if arguments.resume:
        weights, state = get_state_dict(model, optimizer, options=TRAINED)
        kept = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(kept, checkpoint_id=checkpoint)
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state,
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )  # fmt: skip
        first = int(kept["step"])

    prompts = Prompts(tokenizer, MAX_REVIEW_TOKENS)
    reviews, _ = split(load_reviews(arguments.reviews), 384, 0)
    batches = islice(random_batches(reviews, BATCH, 0), first, arguments.steps)
    began = time.perf_counter()
    for step, batch in enumerate(batches, first):
        inputs, labels = prompts.batch(batch[rank::world])  # a part of one batch, whatever the number of processes
        logits = answer_logits(model, {name: value.to(device) for name, value in inputs.items()})
        loss = cross_entropy(logits, prompts.answer_tokens[labels].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1:3d}  loss {mean.item():.4f}", flush=True)
    error = max(orthonormality(model).values())

    weights, state = get_state_dict(model, optimizer, options=TRAINED)
    dcp.save({"model": weights, "optimizer": state, "step": arguments.steps}, checkpoint_id=checkpoint)
    adapter = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))
    if rank == 0:
        model.save_pretrained(arguments.output / "adapter", state_dict=adapter)
        seconds = time.perf_counter() - began
        print(
            f"{world} processes, {seconds:.0f} s; largest ‖QᵀQ − I‖ {error:.1e}; adapter in {arguments.output}/adapter"
        )
    dist.barrier()
    dist.destroy_process_group()
    return int(not error < 1e-5)


if __name__ == "__main__":
    sys.exit(main())

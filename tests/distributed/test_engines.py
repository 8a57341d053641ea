"""Accelerate's and transformers' FSDP2 around our optimizers: prepared, trained, saved, resumed, loaded whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from stella_kernels.diagnostics import orthonormality
from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.peft import StellaConfig, StellaTrainer
from tests.distributed.problem import BUILDERS, apart, batch, model_of, off, train, whole
from tests.distributed.processes import together

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def environment() -> None:
    """What a launcher sets."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "ACCELERATE_USE_CPU": "true"}


def fsdp2_on_a_cpu(plugin: FullyShardedDataParallelPlugin) -> None:
    """Accelerate turns FSDP to plain data parallelism where there is no accelerator; torch's fully_shard does not."""
    AcceleratorState().fsdp_plugin = plugin
    AcceleratorState.distributed_type = property(lambda self: DistributedType.FSDP, lambda self, value: None)


def accelerated(build: str) -> list[dict[str, Tensor]]:
    environment()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10)
    accelerator = Accelerator(cpu=True)
    fsdp2_on_a_cpu(plugin)
    model = model_of("even")
    model, optimizer = accelerator.prepare(model, BUILDERS[build](model))  # built before the model is sharded
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    return train(model, optimizer, 0, 5)


@pytest.mark.parametrize("build", BUILDERS)
def test_accelerate(tmp_path: Path, build: str) -> None:
    plain = model_of("even")
    wanted = train(plain, BUILDERS[build](plain), 0, 5)
    for trajectory in together(2, tmp_path, accelerated, build):
        assert apart(trajectory, wanted) < 1e-6
        assert max(map(off, trajectory)) < 1e-6


def data_parallel(build: str) -> list[dict[str, Tensor]]:
    model = model_of("even")
    optimizer = BUILDERS[build](model)
    parallel = DistributedDataParallel(model)
    trajectory = []
    for step in range(5):
        optimizer.zero_grad()
        x, target = (t.chunk(2)[dist.get_rank()] for t in batch(model, step))
        (parallel(x) - target).square().mean().backward()
        optimizer.step()
        trajectory.append(whole(model))
    return trajectory


@pytest.mark.parametrize("build", BUILDERS)
def test_data_parallel(tmp_path: Path, build: str) -> None:
    plain = model_of("even")
    wanted = train(plain, BUILDERS[build](plain), 0, 5)
    outcomes = together(2, tmp_path, data_parallel, build)
    assert apart(outcomes[0], wanted) < 1e-6
    assert apart(outcomes[0], outcomes[1]) == 0.0  # bit for bit


def flattened(build: str) -> str:
    """As ZeRO does: the optimizer is given one flat copy of this process's part of all parameters."""
    model = model_of("even")
    optimizer = BUILDERS[build](model)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    part = torch.nn.Parameter(flat.chunk(dist.get_world_size())[dist.get_rank()].clone())
    optimizer.param_groups[0]["params"] = [part]
    for group in optimizer.param_groups[1:]:
        group["params"] = []
    part.grad = torch.ones_like(part)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("build", BUILDERS)
def test_flat_copies_are_an_error(tmp_path: Path, build: str) -> None:
    for text in together(2, tmp_path, flattened, build):
        assert "optimizer: it does not hold first.U" in text


def redundancy_free() -> tuple[list[dict[str, Tensor]], str]:
    """AdamW whose state is divided over the processes, attached; and StellaAdamW in its place, which is refused."""
    model = model_of("even")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    attach(optimizer, model)
    try:
        ZeroRedundancyOptimizer(parameters, StellaAdamW, lr=1e-2, factors=model)
        text = ""
    except ValueError as error:
        text = str(error)
    return train(model, optimizer, 0, 5), text


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    plain = model_of("even")
    wanted = train(plain, BUILDERS["attach"](plain), 0, 5)
    outcomes = together(2, tmp_path, redundancy_free)
    for trajectory, text in outcomes:
        assert apart(trajectory, wanted) < 1e-6
        assert "it does not hold" in text
    assert apart(outcomes[0][0], outcomes[1][0]) == 0.0


class ShardedTrainer(StellaTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        layers = ["LlamaDecoderLayer"]
        fsdp2_on_a_cpu(
            FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=layers,
                state_dict_type="FULL_STATE_DICT",
            )
        )
        self.is_fsdp_enabled = True


def language_model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS))


def adapted() -> Any:
    model = language_model()
    return peft.get_peft_model(model, StellaConfig(r=4, target_modules="all-linear"))


def trainer_of(kind: Any, folder: str, steps: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, SIZES["vocab_size"], (16,), generator=generator) for _ in range(32)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_steps=2,
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    return kind(model=adapted(), args=arguments, train_dataset=[{"input_ids": t, "labels": t} for t in texts])


def trained_by_the_trainer(folder: str) -> tuple[bool, float, float]:
    environment()
    trainer = trainer_of(ShardedTrainer, folder, 2)
    trainer.train()
    sharded = {type(p).__name__ for p in trainer.model.parameters()} == {"DTensor"}
    first = max(orthonormality(trainer.model).values())
    trainer = trainer_of(ShardedTrainer, folder, 4)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    trainer.save_model(f"{folder}/final")
    return sharded, first, max(orthonormality(trainer.model).values())


def test_trainer_saves_resumes_and_writes_an_adapter_for_one_device(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    for sharded, first, last in together(2, tmp_path / "processes", trained_by_the_trainer, folder):
        assert sharded
        assert first < 1e-6
        assert last < 1e-6
    loaded = peft.PeftModel.from_pretrained(language_model(), f"{folder}/final")
    factors = stiefel_factors(loaded, frozen=True)
    assert len(factors) == 28  # two of seven matrices in two layers
    assert max(orthonormality(factors).values()) < 1e-6

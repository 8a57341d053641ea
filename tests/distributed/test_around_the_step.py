"""What large runs do around a step: checkpoints at other world sizes, clipping, accumulation, precision, offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from stella_kernels.distributed import shard_base, shard_placement
from stella_kernels.distributed.base import Averaging
from stella_kernels.optim import StellaAdamW
from tests.distributed.problem import BUILDERS, WIDTHS, Model, apart, batch, model_of, off, shard, train, whole
from tests.distributed.processes import together

Trajectory = list[dict[str, Tensor]]


def saved(folder: str, build: str, how: str) -> None:
    model = shard(model_of("even"), how)
    optimizer = BUILDERS[build](model)
    train(model, optimizer, 0, 5)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def resumed(folder: str, build: str, how: str | None) -> Trajectory:
    model: Any = model_of("even")
    with torch.no_grad():
        model.first.S.zero_()  # what is loaded is what counts
    model = shard(model, how) if how else model
    optimizer = BUILDERS[build](model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return train(model, optimizer, 5, 10)


@pytest.mark.parametrize("build", BUILDERS)
def test_saved_by_two_processes_and_resumed_by_four_and_by_one(tmp_path: Path, build: str) -> None:
    folder = str(tmp_path / "checkpoint")
    together(2, tmp_path / "save", saved, folder, build, "rows")
    plain = model_of("even")
    wanted = train(plain, BUILDERS[build](plain), 0, 10)[5:]
    for trajectory in together(4, tmp_path / "four", resumed, folder, build, "default"):
        assert apart(trajectory, wanted) < 1e-6
    for trajectory in together(1, tmp_path / "one", resumed, folder, build, None):
        assert apart(trajectory, wanted) < 1e-6


def accumulated(clip: bool) -> tuple[Trajectory, Trajectory]:
    """Two batches a step, their gradients clipped; sharded, and whole."""

    def run(model: Any) -> Trajectory:
        optimizer = StellaAdamW(model, lr=1e-2)
        trajectory = []
        for step in range(4):
            optimizer.zero_grad()
            for part in range(2):
                x, target = batch(model, 2 * step + part)
                (model(x) - target).square().mean().backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
            optimizer.step()
            trajectory.append(whole(model))
        return trajectory

    return run(shard(model_of("even"), "rows")), run(model_of("even"))


@pytest.mark.parametrize("clip", [False, True])
def test_accumulation_and_clipping(tmp_path: Path, clip: bool) -> None:
    for found, wanted in together(2, tmp_path, accumulated, clip):
        assert apart(found, wanted) < 1e-6


def of_blocks(how: str) -> tuple[Trajectory, Trajectory]:
    """Blocks that are checkpointed, or compiled, each, before they are sharded; and plain ones on one process."""
    model = model_of("even")
    if how == "compiled":
        for layer in (model.first, model.second):
            layer.compile(backend="aot_eager")
    else:
        apply_activation_checkpointing(model, check_fn=lambda module: module in (model.first, model.second))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place = shard_placement(model)
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    plain = model_of("even")
    trajectory = train(model, StellaAdamW(model, lr=1e-2), 0, 4)
    renamed = [{name.replace("_checkpoint_wrapped_module.", ""): t for name, t in one.items()} for one in trajectory]
    return renamed, train(plain, StellaAdamW(plain, lr=1e-2), 0, 4)


@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.whole)])
def test_blocks_that_are_checkpointed_or_compiled(tmp_path: Path, how: str) -> None:
    for found, wanted in together(2, tmp_path, of_blocks, how):
        assert apart(found, wanted) < 1e-6


def in_low_precision(offload: bool) -> tuple[float, list[str]]:
    """bfloat16 in the passes, float32 in the step."""
    model = model_of("even")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    }
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    place: Any = shard_placement(model)
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh, shard_placement_fn=place, **options)
    trajectory = train(model, StellaAdamW(model, lr=1e-2), 0, 4)
    return max(map(off, trajectory)), [str(p.dtype) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("offload", [False, True])
def test_mixed_precision_keeps_float32_factors(tmp_path: Path, offload: bool) -> None:
    for error, dtypes in together(2, tmp_path, in_low_precision, offload):
        assert error < 1e-6
        assert set(dtypes) == {"torch.float32"}


def base_sharded(buckets: int) -> tuple[Trajectory, bool, Trajectory]:
    """The base sharded and the adapters whole; half of a batch on each process, and all of it on one."""

    def run(model: Model, parts: int) -> Trajectory:
        optimizer = StellaAdamW(model, lr=1e-2)
        trajectory = []
        for step in range(5):
            optimizer.zero_grad()
            x, target = (t.chunk(parts)[dist.get_rank() % parts] for t in batch(model, step))
            (model(x) - target).square().mean().backward()
            optimizer.step()
            trajectory.append(whole(model))
        return trajectory

    model = model_of("even")
    shard_base(model, [model.first, model.second], bucket_bytes=buckets)
    sharded = [type(p).__name__ for p in model.parameters() if not p.requires_grad]
    found = run(model, 2)
    return found, set(sharded) == {"DTensor"} and len(sharded) == 4, run(model_of("even"), 1)


@pytest.mark.parametrize("buckets", [64, 1 << 20])
def test_whole_adapters_over_a_sharded_base(tmp_path: Path, buckets: int) -> None:
    outcomes = together(2, tmp_path, base_sharded, buckets)
    for found, sharded, wanted in outcomes:
        assert sharded
        assert apart(found, wanted) < 1e-6
    assert apart(outcomes[0][0], outcomes[1][0]) == 0.0  # bit for bit


def of_some_layers() -> tuple[Any, Any]:
    """A layer that only one process uses: its gradient is half of that process's."""
    model: Any = model_of("even")
    alone: Any = model_of("even")
    Averaging([p for p in model.parameters() if p.requires_grad], dist.group.WORLD, 1 << 10).install()
    x, _ = batch(model, 0)
    y = torch.tanh(model.first(x)) if dist.get_rank() else model(x)
    y.square().mean().backward()
    alone(x).square().mean().backward()
    assert model.second.U.grad is not None
    return model.second.U.grad, alone.second.U.grad / 2


def test_a_layer_that_one_process_uses(tmp_path: Path) -> None:
    for found, wanted in together(2, tmp_path, of_some_layers):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-8)


def refused() -> list[str]:
    texts = []
    sharded: nn.Module = shard(model_of("even"), "rows")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    for model, given in ((sharded, None), (model_of("even"), mesh), (nn.Linear(3, 4), None)):
        try:
            shard_base(model, mesh=given)
            texts.append("none")
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_a_base_that_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    for texts in together(2, tmp_path, refused):
        for text, wanted in zip(texts, ("sharded already", "found 2 dimensions", "no trained Stiefel"), strict=True):
            assert wanted in text


def from_meta(init: str) -> tuple[float, float, Trajectory]:
    """Made on the meta device, sharded, and filled; with another random state on every process."""
    with torch.device("meta"):
        model = Model(WIDTHS["even"], torch.float32)
    for layer in (model.first, model.second):
        layer.init = init
        if init == "pseudo_zero":
            layer.U0, layer.Vt0 = layer.U.detach().clone(), layer.Vt.detach().clone()
    shard(model, "rows")
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    for layer in (model.first, model.second):
        layer.base.reset_parameters()
        layer.reset_parameters()
    start = whole(model)
    apart_of_start = 0.0
    if init == "pseudo_zero":
        apart_of_start = float((model.first.U0 - start["first.U"]).norm())
    trajectory = train(model, StellaAdamW(model, lr=1e-2), 0, 2)
    return off(start), apart_of_start, [start, *trajectory]


@pytest.mark.parametrize("init", ["rando", "pseudo_zero", "svd_major"])
def test_a_model_from_the_meta_device(tmp_path: Path, init: str) -> None:
    outcomes = together(2, tmp_path, from_meta, init)
    for error, buffers, trajectory in outcomes:
        assert error < 4e-6  # of LAPACK's float32 decompositions
        assert buffers == 0.0
        assert apart(trajectory, outcomes[0][2]) == 0.0


def moments_of(build: str) -> bool:
    """Moments are DTensors, and AdamW's state dict by the same names."""
    model = shard(model_of("even"), "rows")
    optimizer = BUILDERS[build](model)
    train(model, optimizer, 0, 1)
    states = list(optimizer.state.values())
    return all({"step", "exp_avg", "exp_avg_sq"} == set(s) and hasattr(s["exp_avg"], "placements") for s in states)


def test_moments_are_sharded(tmp_path: Path) -> None:
    assert all(together(2, tmp_path, moments_of, "fused"))

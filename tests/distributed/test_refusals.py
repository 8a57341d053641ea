"""What is wrong on one process is an error on all, the same, and nothing is changed on any."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stella_kernels.distributed.rows import is_sharded
from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import StellaAdamW, attach, retract
from tests.distributed.problem import BUILDERS, Model, batch, full, model_of, off, shard, train, whole
from tests.distributed.processes import start, together

Outcome = tuple[str, str, bool]


def local(p: Any) -> torch.Tensor:
    return p.detach().to_local() if is_sharded(p) else p.detach()


def gradient_nan(model: Model) -> None:
    if dist.get_rank() == 1:
        local(model.second.Vt.grad)[..., 0] = torch.nan


def gradient_of_s(model: Model) -> None:
    if dist.get_rank() == 0:
        local(model.first.S.grad)[0] = torch.inf


def gradient_overflows(model: Model) -> None:
    if dist.get_rank() == 1:
        local(model.first.U.grad)[0] = 3e38


def value_nan(model: Model) -> None:
    if dist.get_rank() == 1:
        local(model.first.U)[0] = torch.nan


def moved(model: Model) -> None:
    if dist.get_rank() == 1:
        local(model.first.U).mul_(1.5)


FAULTS: dict[str, tuple[Callable[[Model], None], str, str]] = {
    "gradient": (gradient_nan, "NonFiniteError", r"gradient of second.Vt holds NaN"),
    "gradient of S": (gradient_of_s, "NonFiniteError", r"S beside first.U"),
    "large gradient": (gradient_overflows, "NonFiniteError", r"gradient of first.U is finite and so large"),
    "value": (value_nan, "NonFiniteError", r"value of first.U holds NaN"),
    "moved": (moved, "OffManifoldError", r"first.U: found ‖QᵀQ − I‖ = "),
}


def faulty(build: str) -> list[Outcome]:
    return [outcome_of(build, fault) for fault in FAULTS]


def outcome_of(build: str, fault: str) -> Outcome:
    """The error's type and text, and whether every process's parameters and moments are as they were."""
    model = shard(model_of("even"), "rows")
    optimizer = BUILDERS[build](model)
    train(model, optimizer, 0, 2)
    optimizer.zero_grad()
    x, target = batch(model, 2)
    (model(x) - target).square().mean().backward()
    FAULTS[fault][0](model)
    before = [local(p).clone() for p in model.parameters()]
    moments = [full(s["exp_avg"]).clone() for s in optimizer.state.values()]
    counts = [float(s["step"]) for s in optimizer.state.values()]
    try:
        optimizer.step()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        same = all(
            torch.equal(local(p).nan_to_num(), b.nan_to_num()) for p, b in zip(model.parameters(), before, strict=True)
        )
        same &= all(torch.equal(full(s["exp_avg"]), m) for s, m in zip(optimizer.state.values(), moments, strict=True))
        same &= counts == [float(s["step"]) for s in optimizer.state.values()]
        return type(error).__name__, str(error), same
    return "none", "", False


@pytest.mark.parametrize("build", BUILDERS)
def test_a_fault_on_one_process_is_an_error_on_all(tmp_path: Path, build: str) -> None:
    first, second = together(2, tmp_path, faulty, build)
    assert first == second
    for (kind, text, unchanged), (_, wanted, pattern) in zip(first, FAULTS.values(), strict=True):
        assert kind == wanted, text
        assert re.search(pattern, text), text
        assert unchanged, text


def skipping() -> tuple[dict[str, int], bool]:
    model = shard(model_of("even"), "rows")
    optimizer = StellaAdamW(model, lr=1e-2, skip_nonfinite=True)
    train(model, optimizer, 0, 1)
    before = whole(model)
    x, target = batch(model, 2)
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    gradient_nan(model)
    gradient_of_s(model)
    optimizer.step()
    same = all(torch.equal(value, before[name]) for name, value in whole(model).items())
    train(model, optimizer, 3, 4)
    return dict(optimizer.skipped), same and not torch.equal(whole(model)["first.U"], before["first.U"])


def test_a_step_is_skipped_on_all_processes(tmp_path: Path) -> None:
    for skipped, right in together(2, tmp_path, skipping):
        assert skipped == {"second.Vt": 1, "S beside first.U": 1}
        assert right


def brought_back(build: str) -> tuple[float, float]:
    """``‖QᵀQ − I‖`` after a step with a factor that somebody scaled, and after optim.retract of another."""
    model = shard(model_of("even"), "rows")
    if build == "fused":
        optimizer: torch.optim.Optimizer = StellaAdamW(model, lr=1e-2, on_foreign_move="retract")
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        attach(optimizer, model, on_foreign_move="retract")
    train(model, optimizer, 0, 1)
    local(model.first.U).mul_(3.0)
    after = off(train(model, optimizer, 1, 2)[0])
    local(model.second.Vt).mul_(7.0)
    retract(model)
    return after, off(whole(model))


@pytest.mark.parametrize("build", BUILDERS)
def test_a_factor_that_was_moved_is_brought_back(tmp_path: Path, build: str) -> None:
    for after, retracted in together(2, tmp_path, brought_back, build):
        assert after < 1e-6
        assert retracted < 1e-6


def long_steps() -> tuple[float, float]:
    """With a rate so large that the Gram matrix of a move is ill-conditioned: a further retraction mends that."""
    model = shard(model_of("even"), "rows")
    trajectory = train(model, StellaAdamW(model, lr=30.0, weight_decay=0.0), 0, 3)
    plain = model_of("even")
    wanted = train(plain, StellaAdamW(plain, lr=30.0, weight_decay=0.0), 0, 1)
    first = trajectory[0]["first.U"]
    return max(map(off, trajectory)), float((first - wanted[0]["first.U"]).norm())


def test_long_steps(tmp_path: Path) -> None:
    for error, apart in together(2, tmp_path, long_steps):
        assert error < 1e-6
        assert apart < 1e-4


def unsupported() -> list[str]:
    texts = []
    model = shard(model_of("even"), "rows")
    parameters = [p for p in model.parameters() if p.requires_grad]
    calls: list[Callable[[], object]] = [
        lambda: attach(torch.optim.AdamW(parameters, weight_decay=0.0), model, retraction="qr"),
        lambda: attach(torch.optim.AdamW(parameters, weight_decay=0.0), model, geometry="quotient"),
        lambda: attach(torch.optim.AdamW(parameters, weight_decay=0.0), model, method="svd"),
        lambda: StellaAdamW(model, coupled=True),
    ]
    for call in calls:
        try:
            call()
            texts.append("none")
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_what_sharded_factors_cannot_have_is_refused(tmp_path: Path) -> None:
    for texts in together(2, tmp_path, unsupported):
        for text, argument in zip(texts, ("retraction", "geometry", "method", "coupled"), strict=True):
            assert text.startswith(f"{argument}: "), text


def exchanged(build: str) -> float:
    """As Accelerate does: an optimizer is built, the model sharded, and the optimizer given its new parameters."""
    model = model_of("even")
    optimizer = BUILDERS[build](model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    shard(model, "rows")
    new = dict(model.named_parameters())
    for group, held in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [new[name] for name in held]
    plain = model_of("even")
    wanted = train(plain, BUILDERS[build](plain), 0, 4)
    found = train(model, optimizer, 0, 4)
    assert len(stiefel_factors(model)) == 4
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for a, b in zip(found, wanted, strict=True) for n in b)


@pytest.mark.parametrize("build", BUILDERS)
def test_parameters_that_an_engine_exchanges_are_followed(tmp_path: Path, build: str) -> None:
    for difference in together(2, tmp_path, exchanged, build):
        assert difference < 1e-6


def abandoned(build: str) -> str:
    """Sharded, and the optimizer never told."""
    model: nn.Module = model_of("even")
    optimizer = BUILDERS[build](model)
    shard(model, "rows")
    try:
        train(model, optimizer, 0, 4)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("build", BUILDERS)
def test_parameters_that_the_optimizer_never_learns_of_are_an_error(tmp_path: Path, build: str) -> None:
    for text in together(2, tmp_path, abandoned, build):
        assert "is another parameter now (DTensor)" in text


def with_whole_moments() -> str:
    """The state of one process, loaded by torch's own ``load_state_dict``."""
    plain = model_of("even")
    one = StellaAdamW(plain, lr=1e-2)
    train(plain, one, 0, 1)
    model = shard(model_of("even"), "rows")
    optimizer = StellaAdamW(model, lr=1e-2)
    optimizer.load_state_dict(one.state_dict())
    before = whole(model)
    try:
        train(model, optimizer, 1, 2)
    except ValueError as error:
        assert all(torch.equal(value, before[name]) for name, value in whole(model).items())
        return str(error)
    return ""


def test_whole_moments_beside_sharded_factors_are_an_error(tmp_path: Path) -> None:
    for text in together(2, tmp_path, with_whole_moments):
        assert "found a moment exp_avg" in text
        assert "set_optimizer_state_dict" in text


def _one_dies(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=2, rank=rank, timeout=timeout)
    model = shard(model_of("even"), "rows")
    optimizer = StellaAdamW(model, lr=1e-2)
    train(model, optimizer, 0, 1)
    x, target = batch(model, 1)
    (model(x) - target).square().mean().backward()
    if rank == 1:
        os._exit(0)
    try:
        optimizer.step()
    except RuntimeError as error:
        Path(folder, "error").write_text(str(error))
    os._exit(0)


def test_a_process_that_dies_ends_the_others_with_an_error(tmp_path: Path) -> None:
    start(2, _one_dies, (str(tmp_path),))
    # Whether gloo sees the connection closed, reset or silent is a race of the two processes.
    assert "gloo" in (tmp_path / "error").read_text()

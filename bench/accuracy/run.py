"""One run: a method at a rank and a rate, on a task, from a seed."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from bench.accuracy.encoder import LINEAR_LAYERS
from bench.accuracy.spectra import compare, factors_of
from bench.accuracy.tasks import Task
from stella_kernels.checks import NonFiniteError
from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.peft import StellaConfig

STEPS, BATCH, WARM_UP = 60, 16, 6
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STELLA: dict[str, dict[str, Any]] = {
    "stella": {},
    "stella-zero": {"init_lora_weights": "zero"},
    "stella-svd": {"init_lora_weights": "svd_major"},
    "stella-diagonal": {"stella_diag_s": True},
    "stella-euclidean": {"stella_geometry": "euclidean"},
    "stella-quotient": {"stella_geometry": "quotient"},
    "stella-exp": {"stella_retraction": "exp_map"},
    "stella-unscaled": {"stella_grad_scaling": False},
}
LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}
# geometries that StellaAdamW does not have: AdamW with hooks, or none for the Euclidean one
ATTACHED: dict[str, dict[str, Any]] = {
    "stella-euclidean": {},
    "stella-quotient": {"geometry": "quotient"},
    "stella-exp": {"retraction": "exp_map"},
}
METHODS = ("probe", "full", *LORA, *STELLA)
PUBLISHED = ("probe", "full", "lora", "rslora", "pissa", "stella", "stella-zero")  # those of PROTOCOL.md


@dataclass(frozen=True)
class Case:
    """What a run is of; ``stage`` is ``rate`` (scored on validation) or ``test``."""

    task: str
    stage: str
    method: str
    rank: int
    rate: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.task}/{self.stage}-{self.method}-r{self.rank}-{self.rate:g}-seed{self.seed}.json"


class Classifier(nn.Module):
    """The adapted blocks and the linear layer on top."""

    def __init__(self, tail: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.tail, self.head = tail, nn.Linear(width, classes)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.head(self.tail(x, mask))


def build(case: Case, task: Task) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(case.seed)
    tail: Any = task.tail()
    width, common = task.x.shape[-1], {"r": case.rank, "lora_alpha": case.rank, "target_modules": list(LINEAR_LAYERS)}
    if case.method in LORA:
        tail = get_peft_model(tail, LoraConfig(**common, **LORA[case.method]))
    elif case.method in STELLA:
        tail = get_peft_model(tail, StellaConfig(**common, **STELLA[case.method]))
    else:
        tail.requires_grad_(case.method == "full")
    model = Classifier(tail, width, task.classes)
    if case.method in STELLA and case.method not in ATTACHED:
        scaling = float(width) if case.method != "stella-unscaled" else False
        return model, StellaAdamW(model, lr=case.rate, weight_decay=0.0, grad_scaling=scaling)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=case.rate, weight_decay=0.0)
    if options := ATTACHED.get(case.method):
        attach(adamw, model, grad_scaling=float(width), **options)
    return model, adamw


def _part(task: Task, model: nn.Module, chosen: Tensor) -> Tensor:
    return model(task.x[chosen], None if task.mask is None else task.mask[chosen])


def loss_of(task: Task, predicted: Tensor, y: Tensor) -> Tensor:
    return mse_loss(predicted[:, 0], y) if task.classes == 1 else cross_entropy(predicted, y)


@torch.no_grad()
def score(task: Task, model: nn.Module, chosen: Tensor) -> float:
    """Accuracy, or R² of a regression."""
    predicted = torch.cat([_part(task, model, part) for part in chosen.split(64)])
    y = task.y[chosen]
    if not predicted.isfinite().all():
        return 0.0
    if task.classes > 1:
        return float((predicted.argmax(1) == y).float().mean())
    return float(1 - (predicted[:, 0] - y).square().sum() / (y - y.mean()).square().sum())


def factor_of(step: int, steps: int) -> float:
    """Of the rate: warm-up, then a cosine to 0."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def run(case: Case, task: Task, steps: int = STEPS) -> dict[str, Any]:
    """Train and score; what goes into the run's JSON."""
    model, optimizer = build(case, task)
    start = factors_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor_of(step, steps))
    chosen, generator = task.drawn(case.seed), torch.Generator().manual_seed(case.seed)
    losses: list[float] = []
    seconds: list[float] = []
    failed = ""
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(chosen), generator=generator)
        batch, order = chosen[order[:BATCH]], order[BATCH:]
        began = time.perf_counter()
        loss = loss_of(task, _part(task, model, batch), task.y[batch])
        if not loss.isfinite():
            failed = "the loss is not finite"
            break
        optimizer.zero_grad()
        loss.backward()
        try:
            optimizer.step()
        except NonFiniteError as error:
            failed = str(error)[:200]
            break
        schedule.step()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    model.eval()
    held = task.validation() if case.stage == "rate" else task.test()
    return {
        **asdict(case),
        "score": 0.0 if failed else score(task, model, held),
        "failed": failed,
        "steps": steps,
        "batch": BATCH,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "curve": [round(statistics.fmean(losses[i : i + 5]), 4) for i in range(0, len(losses), 5)],
        "adapters": {} if failed or not start else compare(model, start),
        "seconds_a_step": round(statistics.median(seconds), 5) if seconds else None,
        "versions": {"torch": str(torch.__version__), "peft": version("peft"), "transformers": version("transformers")},
    }

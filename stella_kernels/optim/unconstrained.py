"""The part of StellaAdamW that is torch's AdamW: groups, options, and the step of the unconstrained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from ..nn import StiefelFactor


def groups_of(model: nn.Module, factors: Sequence[StiefelFactor]) -> list[dict[str, Any]]:
    """The trainable parameters of a model: the constrained ones without weight decay, and the rest."""
    constrained = {id(f.parameter) for f in factors}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in constrained], "weight_decay": 0.0},
        {"params": [p for p in trainable if id(p) not in constrained]},
    ]


def refuse_options(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for options of torch's AdamW that StellaAdamW does not have."""
    for option in ("amsgrad", "capturable", "differentiable"):
        if group.get(option):
            raise ValueError(
                f"{option}: found {group[option]!r}, wanted False: StellaAdamW does not have it; use "
                f"torch.optim.AdamW({option}=True) with stella_kernels.optim.attach."
            )


def step_free(optimizer: AdamW, group: dict[str, Any], parameters: list[Tensor]) -> None:
    """torch's own AdamW; through its function, since ``super().step()`` would fire the hooks a second time."""
    moving: list[Tensor] = []
    gradients: list[Tensor] = []
    exp_avgs: list[Tensor] = []
    exp_avg_sqs: list[Tensor] = []
    steps: list[Tensor] = []
    has_complex = optimizer._init_group(
        {**group, "params": parameters}, moving, gradients, exp_avgs, exp_avg_sqs, [], steps
    )
    beta1, beta2 = group["betas"]
    adamw(
        moving,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=group["foreach"],
        fused=group["fused"],
        has_complex=has_complex,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )

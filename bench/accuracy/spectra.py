"""What training did to the adapters: how far the weights moved, in how many directions, how far subspaces turned."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from stella_kernels.diagnostics import principal_angles

Factors = dict[str, tuple[Tensor, Tensor]]  # by layer: B (m, r) with the scale, A (r, n), so that B A is the adapter


@torch.no_grad()
def factors_of(model: nn.Module) -> Factors:
    """The adapters of a model by PEFT, LoRA's or StelLA's, as they are now, in float64."""
    found: Factors = {}
    for name, module in model.named_modules():
        if hasattr(module, "stella_U") and len(module.stella_U):
            U, S, Vt = (
                kind["default"].weight.double() for kind in (module.stella_U, module.stella_S, module.stella_Vt)
            )
            left = U * S if S.dim() == 1 else U @ S
            found[name] = module.scaling["default"] * left, Vt.clone()
        elif hasattr(module, "lora_A") and len(module.lora_A):
            B, A = (kind["default"].weight.double() for kind in (module.lora_B, module.lora_A))
            found[name] = module.scaling["default"] * B, A.clone()
    return found


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Those of B A (m, k) (k, n), k of them, from the small factors alone."""
    left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.mT).R
    return torch.linalg.svdvals(left @ right.mT)


def participation(values: Tensor) -> float:
    """``(Σσ²)² / Σσ⁴``: k of k equal singular values, 1 of a single one."""
    squares = values.square()
    return float(squares.sum().square() / squares.square().sum().clamp_min(1e-300))


def turn(before: Tensor, after: Tensor) -> float | None:
    """Mean ``sin²`` of the principal angles between the column spaces of two tall matrices; None where one is 0."""
    if not (before.any() and after.any()):
        return None
    return float(principal_angles(after, before).sin().square().mean())


@torch.no_grad()
def compare(model: nn.Module, before: Factors) -> dict[str, float]:
    """Means over the adapted layers.

    Returns ``change``, ‖ΔW‖ / ‖W‖ in Frobenius norm, ΔW from start to end; ``change_rank`` and ``adapter_rank``, the
    participation of singular values of ΔW and of the adapter; ``turn_in`` and ``turn_out``, of the subspaces of inputs
    (A, V) and outputs (B, U), the latter missing where the start is 0.
    """
    weights = {name: module.get_base_layer().weight for name, module in model.named_modules() if name in before}
    rows: dict[str, list[float]] = {}
    for name, (B, A) in factors_of(model).items():
        B0, A0 = before[name]
        moved = singular_values(torch.cat([B, -B0], 1), torch.cat([A, A0], 0))
        found = {
            "change": float(moved.norm() / weights[name].double().norm()),
            "change_rank": participation(moved),
            "adapter_rank": participation(singular_values(B, A)),
            "turn_in": turn(A0.mT, A.mT),
            "turn_out": turn(B0, B),
        }
        for key, value in found.items():
            if value is not None:
                rows.setdefault(key, []).append(value)
    return {key: round(statistics.fmean(values), 5) for key, values in rows.items()}

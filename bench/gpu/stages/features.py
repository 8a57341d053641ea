"""The checks of ``bench/gpu/features.py``, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu import features
from bench.gpu.setting import Setting, attempt


def run(setting: Setting) -> None:
    """A verdict for each check that there is time for."""
    device = setting.device
    for index, check in enumerate(features.CHECKS):
        name = check.__name__.replace("_", " ")
        slow = 15.0 if check is features.compiled and device.type == "cuda" else 0.0  # inductor's first
        if setting.left < slow:
            setting.missing(f"{name} and {len(features.CHECKS) - index - 1} more checks: no time left")
            break
        torch.manual_seed(index)
        found = attempt(setting, name, lambda check=check: _worst(setting, check, device))
        if found is not None:
            count, (what, error, bound) = found
            told = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
            met = error <= bound  # NaN does not pass
            setting.verdict(met, f"{name}: {told} ({count} comparisons, worst {what}: {error:.1e} of {bound:.1e})")


def _worst(
    setting: Setting, check: Callable[[torch.device], features.Compared], device: torch.device
) -> tuple[int, tuple[str, float, float]] | None:
    try:
        every = list(check(device))
    except features.NotHereError as error:
        setting.missing(f"{check.__name__.replace('_', ' ')}: {error}")
        return None
    missed = [one for one in every if not one[1] <= one[2]]
    if missed:
        return len(every), missed[0]
    return len(every), max(every, key=lambda one: one[1] / one[2] if one[2] else 0.0)

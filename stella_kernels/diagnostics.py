"""How factors fare in training: how orthonormal they are, and how far their subspaces have turned from the start."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .checks import NonFiniteError, check_float_tensor, check_tall
from .distributed import measures
from .distributed.rows import is_sharded
from .nn import StiefelFactor, missing_factors_advice, orthonormality_tolerance, stiefel_factors
from .reference import stiefel


def _float64(value: Tensor) -> Tensor:
    # on the CPU, as some devices have no float64; a factor is small beside a model
    return value.detach().to(device="cpu", dtype=torch.float64)


def _whole(factor: StiefelFactor) -> Tensor:
    """The factor (n, r); a sharded one is gathered, by every process."""
    value = factor.view
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


def _factors(target: nn.Module | Iterable[StiefelFactor]) -> list[StiefelFactor]:
    factors = stiefel_factors(target) if isinstance(target, nn.Module) else list(target)
    if not factors or not all(isinstance(f, StiefelFactor) for f in factors):
        if isinstance(target, nn.Module):
            found, advice = type(target).__name__, missing_factors_advice(target)
        else:
            found, advice = f"{len(factors)} objects", "take them from stella_kernels.nn.stiefel_factors(model)"
        raise ValueError(
            f"target: found {found}, wanted a model with trainable Stiefel factors, or a sequence of StiefelFactor; "
            f"{advice}."
        )
    return factors


@torch.no_grad()
def orthonormality(target: nn.Module | Iterable[StiefelFactor]) -> dict[str, float]:
    """``‖QᵀQ − I‖`` in Frobenius norm of each factor Q (n, r), by name, computed in float64.

    Of sharded factors, which are not gathered, in the dtype of their arithmetic; every process has to call it then.

    Args:
        target: a model with StelLA adapters, or factors; any float dtype and device.

    Raises:
        ValueError: there are no factors.
    """
    factors = _factors(target)
    sharded = [f for f in factors if is_sharded(f.parameter)]
    errors = dict(zip([f.name for f in sharded], measures.distances(sharded) if sharded else [], strict=True))
    return {
        f.name: errors[f.name] if f.name in errors else float(stiefel.orthonormality_error(_float64(f.view)))
        for f in factors
    }


def off_manifold(target: nn.Module | Iterable[StiefelFactor], slack: float = 1.0) -> dict[str, float]:
    """``‖QᵀQ − I‖`` of the factors that are further from the manifold than round-off explains, by name.

    Args:
        target: a model with StelLA adapters, or factors; any float dtype and device.
        slack: how many times the round-off of one retraction to allow.

    Raises:
        ValueError: there are no factors.
    """
    factors = _factors(target)
    errors = orthonormality(factors)
    # not "greater", as NaN is off the manifold too
    return {f.name: errors[f.name] for f in factors if not errors[f.name] <= slack * orthonormality_tolerance(f)}


def describe_off(errors: dict[str, float]) -> str:
    """The worst of ``off_manifold``, in words, and what to do."""
    worst = sorted(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name], reverse=True)
    named = ", ".join(f"{name} (‖QᵀQ − I‖ = {errors[name]:.3g})" for name in worst[:3])
    more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
    return (
        f"found {named}{more}, wanted orthonormal columns. Something other than the Riemannian step moved them, such "
        "as an average of weights, or an optimizer without stella_kernels.optim.attach. To retract them, for factor in "
        "stella_kernels.nn.stiefel_factors(model): factor.view.copy_(stella_kernels.polar(factor.view)); where they "
        "hold NaN, go back to a checkpoint"
    )


def check(target: nn.Module | Iterable[StiefelFactor]) -> None:
    """Raise unless every trainable factor is on its Stiefel manifold, up to the round-off of its shape and dtype.

    Args:
        target: a model with StelLA adapters, or factors; any float dtype and device.

    Raises:
        NonFiniteError: a factor holds NaN or an infinity.
        ValueError: there are no factors, or some do not have orthonormal columns; the message names them.
    """
    errors = off_manifold(target)
    broken = [name for name, error in errors.items() if not math.isfinite(error)]
    if broken:
        raise NonFiniteError(f"target: {describe_off({name: errors[name] for name in broken})}.", broken)
    if errors:
        raise ValueError(f"target: {describe_off(errors)}.")


@torch.no_grad()
def principal_angles(now: Tensor, start: Tensor) -> Tensor:
    """The r principal angles between the column spaces of two matrices, in radians, increasing, in [0, π/2].

    A factor turned within its own subspace, Y O with O orthogonal, has angles 0. Cosines are the singular values of
    ``Q₀ᵀQ``; an angle below π/4 is taken from its sine, a singular value of ``Q − Q₀ Q₀ᵀ Q``, because a cosine loses
    half of the digits of a small angle (Björck and Golub 1973).

    Args:
        now: (n, r) with n >= r and of full rank, any float dtype and device; need not be orthonormal.
        start: as ``now``, of its shape.

    Returns:
        (r,) float64 on the CPU.

    Raises:
        TypeError: an argument that is not a floating-point tensor.
        ValueError: an argument that is not a matrix (n, r) with n >= r, or shapes that differ.
    """
    for name, value in (("now", now), ("start", start)):
        check_float_tensor(name, value)
        check_tall(name, value)
    if now.dim() != 2 or now.shape != start.shape:
        raise ValueError(
            f"now, start: found shapes {tuple(now.shape)} and {tuple(start.shape)}, wanted two matrices (n, r) alike."
        )
    Q, Q0 = (torch.linalg.qr(_float64(value)).Q for value in (now, start))  # (n, r)
    overlap = Q0.mT @ Q  # (r, r)
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)  # (r,), decreasing: angles increase
    sines = torch.linalg.svdvals(Q - Q0 @ overlap).flip(0).clamp(max=1.0)  # (r,), increasing, of the same angles
    return torch.where(cosines.square() >= 0.5, torch.asin(sines), torch.acos(cosines))


@dataclass
class Record:
    """What was measured at one step: for each factor, by name, ``‖QᵀQ − I‖`` and the (r,) angles to its start."""

    step: int
    orthonormality: dict[str, float]
    angles: dict[str, Tensor] = field(repr=False)


class Recorder:
    """Measures a model's factors now and then, and plots the course of both measures.

        recorder = Recorder(model)           # copies every factor: the start
        for step, batch in enumerate(data):
            ...
            if step % 100 == 0:
                recorder.record(step)
        recorder.plot("training.png")

    Args:
        target: a model with StelLA adapters, or factors (``StiefelFactor``); any float dtype and device.

    Attributes:
        history: a ``Record`` for each call of ``record``, in order.

    Raises:
        ValueError: there are no factors.
    """

    def __init__(self, target: nn.Module | Iterable[StiefelFactor]) -> None:
        self._factors = _factors(target)
        self._start = [_whole(factor).cpu().clone() for factor in self._factors]
        self.history: list[Record] = []

    def record(self, step: int) -> Record:
        """Measure all factors; the record is also added to ``history``. One small QR and SVD a factor, on the CPU."""
        measured = zip(self._factors, self._start, strict=True)
        angles = {f.name: principal_angles(_whole(f), start) for f, start in measured}
        self.history.append(Record(step, orthonormality(self._factors), angles))
        return self.history[-1]

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write a figure of ``history`` to ``path`` (its ending says the format) and return the path.

        Above: ``‖QᵀQ − I‖`` of each factor, on a logarithmic scale. Below: the largest principal angle of each to its
        start, in degrees, and the median over factors of the mean angle.

        Raises:
            ValueError: nothing was recorded.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if not self.history:
            raise ValueError("history: found nothing, wanted at least one record(step) before plot.")
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot: matplotlib is not installed; pip install stella_kernels[plot].", name="matplotlib"
            ) from error
        figure = Figure(figsize=(8, 7), layout="constrained")
        FigureCanvasAgg(figure)  # draws into memory: no window, and pyplot's global state is left alone
        above, below = figure.subplots(2, 1, sharex=True)
        steps = [record.step for record in self.history]
        smallest = torch.finfo(torch.float64).eps  # a logarithmic axis has no zero
        faint = {"marker": ".", "linewidth": 0.8, "alpha": max(0.15, min(1.0, 6 / len(self._factors)))}
        for factor in self._factors:
            name = factor.name if len(self._factors) <= 8 else None
            errors = [max(record.orthonormality[factor.name], smallest) for record in self.history]
            largest = [float(torch.rad2deg(record.angles[factor.name][-1])) for record in self.history]
            above.plot(steps, errors, label=name, **faint)
            below.plot(steps, largest, label=name, **faint)
        means = [torch.stack([a.mean() for a in record.angles.values()]).median() for record in self.history]
        below.plot(steps, torch.rad2deg(torch.stack(means)).tolist(), "k--", label="median of the mean angles")
        above.set(yscale="log", ylabel="‖QᵀQ − I‖", title=f"{len(self._factors)} factors")
        below.set(xlabel="step", ylabel="angle to the start (degrees)", ylim=(0, None))
        below.legend(fontsize="small")
        written = Path(path)
        figure.savefig(written)
        return written

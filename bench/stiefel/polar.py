"""The native polar factor against torch's SVD, QR and the best composition of torch calls, and against the floor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.common.device import CPU
from bench.common.shapes import Case
from bench.common.timing import Machine, Verdict, interleaved_medians, milliseconds
from bench.stiefel import compositions
from stella_kernels.functional import polar

STEP_NORM = 0.15  # spectral norm of the step: at learning rate 5e-4 training takes steps of 0.03 to 0.18
ERROR_MATRICES = 2  # matrices of the batch whose error is measured: the float64 SVD is slow
WANTED_OVER_SVD = {(4096, 8): 10.0, (4096, 32): 8.0}  # (n, r): least ratio


@dataclass(frozen=True)
class Row:
    """One case: seconds of each candidate, and the largest relative error of two of them."""

    case: Case
    seconds: dict[str, float]
    floor: float
    native_error: float
    svd_error: float

    @property
    def over_svd(self) -> float:
        return self.seconds["svd"] / self.seconds["native"]

    @property
    def best_composition(self) -> str:
        return min(compositions.POLAR, key=lambda name: self.seconds[name])

    @property
    def over_best(self) -> float:
        return self.seconds[self.best_composition] / self.seconds["native"]

    @property
    def of_floor(self) -> float:
        return self.floor / self.seconds["native"]

    def as_dict(self) -> dict[str, object]:
        """The row as plain JSON types."""
        return {
            **asdict(self.case),
            "seconds": self.seconds,
            "floor_seconds": self.floor,
            "best_composition": self.best_composition,
            "ratio_to_svd": self.over_svd,
            "ratio_to_best_composition": self.over_best,
            "fraction_of_floor": self.of_floor,
            "native_error": self.native_error,
            "svd_error": self.svd_error,
        }


def retraction_input(batch: int, n: int, r: int, generator: torch.Generator | None = None) -> Tensor:
    """``Y + Δ`` as a training step leaves it: Y orthonormal, Δ tangent, ``‖Δ‖₂ = STEP_NORM``; contiguous float32."""
    Y = torch.linalg.qr(torch.randn(batch, n, r, generator=generator)).Q
    delta = torch.randn(batch, n, r, generator=generator)
    product = Y.mT @ delta
    delta -= Y @ (0.5 * (product + product.mT))
    norm = torch.linalg.eigvalsh(delta.mT @ delta)[:, -1].sqrt()  # (batch,)
    return (Y + delta * (STEP_NORM / norm)[:, None, None]).contiguous()  # Y is LAPACK's, and column-major


def relative_error(Q: Tensor, exact: Tensor) -> float:
    """Largest ``‖Q − exact‖_F / ‖exact‖_F`` over a batch; ``exact`` is float64."""
    difference = torch.linalg.matrix_norm(Q.double() - exact)
    return float((difference / torch.linalg.matrix_norm(exact)).max())


def measure(case: Case, machine: Machine, seconds: float, device: torch.device = CPU) -> Row:
    """Time every candidate on one case for about ``seconds`` and measure the errors against LAPACK's float64 SVD."""
    M = retraction_input(case.batch, case.n, case.r, torch.Generator().manual_seed(case.n * 1000 + case.r)).to(device)
    candidates = {
        "native": lambda: polar(M),
        "qr": lambda: compositions.qr(M),
        **{name: (lambda run=run: run(M)) for name, run in compositions.POLAR.items()},
    }
    if (torchs := getattr(torch.linalg, "polar", None)) is not None:  # since torch 2.14
        candidates["linalg_polar"] = lambda: torchs(M)
    few = M[:ERROR_MATRICES]
    exact = compositions.svd(few.double().cpu())
    return Row(
        case=case,
        seconds=interleaved_medians(candidates, seconds, device),
        floor=machine.floor(case.batch, case.n, case.r),
        native_error=relative_error(polar(few).cpu(), exact),
        svd_error=relative_error(compositions.svd(few).cpu(), exact),
    )


HEADER = (
    f"{'batch × n × r':>17} | {'native':>8} {'svd':>8} {'qr':>8} {'eigh':>8} {'N-S':>8} ms | "
    f"{'×svd':>6} {'×best torch':>11} {'of floor':>8} | {'error':>7} {'svd err':>7}"
)


def table_row(row: Row) -> str:
    """One line of the table on the terminal."""
    names = ("native", "svd", "qr", "gram_eigh", "gram_newton_schulz")
    times = " ".join(milliseconds(row.seconds[name], 8, 2) for name in names)
    shape = f"{row.case.batch} × {row.case.n} × {row.case.r}"
    return (
        f"{shape:>17} | {times}    | {row.over_svd:6.1f} {row.over_best:11.2f} {row.of_floor:8.0%} | "
        f"{row.native_error:7.1e} {row.svd_error:7.1e}"
    )


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """What the package promises of its polar factor, each with whether this run bore it out."""
    for row in rows:
        wanted = WANTED_OVER_SVD.get((row.case.n, row.case.r))
        if wanted is not None:
            found = f"{row.over_svd:.1f} times faster than the SVD, wanted {wanted:g}"
            yield Verdict(row.over_svd >= wanted, f"n = {row.case.n}, r = {row.case.r}: {found}")
    slower = [row for row in rows if row.over_best <= 1]
    yield Verdict(not slower, f"faster than every torch composition{_except_for(slower, rows)}")
    worse = [row for row in rows if row.native_error > row.svd_error]
    yield Verdict(not worse, f"error no larger than the float32 SVD's own{_except_for(worse, rows)}", timed=False)


def _except_for(missed: Sequence[Row], rows: Sequence[Row]) -> str:
    if not missed:
        return f" in all {len(rows)} cases"
    return ", but not at (n, r) = " + ", ".join(f"({row.case.n}, {row.case.r})" for row in missed)

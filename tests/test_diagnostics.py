"""Diagnostics: known angles, known errors, a course of training recorded and drawn."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stella_kernels as sk
from stella_kernels.checks import NonFiniteError
from stella_kernels.diagnostics import Recorder, orthonormality, principal_angles
from stella_kernels.nn import StellaLinear, StiefelFactor, stiefel_factors
from stella_kernels.optim import attach
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float64).eps


def turned(angles: list[float], n: int = 20) -> tuple[Tensor, Tensor]:
    """Two orthonormal (n, r) whose column spaces have exactly these principal angles, in bases that hide it."""
    r = len(angles)
    basis, theta = orthonormal(n, 2 * r), torch.tensor(angles, dtype=torch.float64)
    start = basis[:, :r]
    now = start * theta.cos() + basis[:, r:] * theta.sin()
    return now @ orthonormal(r, r), start @ orthonormal(r, r)


@pytest.mark.parametrize(
    "angles",
    [
        [0.0, 0.3, 1.2, math.pi / 2],
        [1e-12, 1e-9, 1e-6],
        [math.pi / 4 - 1e-9, math.pi / 4 + 1e-9],
        [math.pi / 2 - 1e-9, math.pi / 2],
        [0.7],
    ],
)
def test_known_angles(angles: list[float]) -> None:
    """To an absolute 100 eps: also small ones, of which a cosine alone would know nothing below 1e-8."""
    now, start = turned(angles)
    found = principal_angles(now, start)
    assert found.shape == (len(angles),)
    assert float((found - torch.tensor(angles, dtype=torch.float64)).abs().max()) < 100 * EPS


def test_angles_are_of_the_subspaces() -> None:
    now, start = turned([0.1, 0.5, 0.9])
    skewed = now @ torch.randn(3, 3, dtype=torch.float64)  # another basis of the same space, not orthonormal
    assert float((principal_angles(skewed, start) - principal_angles(now, start)).abs().max()) < 1e-10
    assert float(principal_angles(start @ orthonormal(3, 3), start).max()) < 100 * EPS
    square = orthonormal(4, 4), orthonormal(4, 4)  # the whole space twice
    assert float(principal_angles(*square).max()) < 100 * EPS


def test_orthonormality_is_that_of_the_columns_as_viewed() -> None:
    Q = orthonormal(9, 3)
    stored = nn.Parameter((2 * Q).mT.contiguous().float())
    found = orthonormality([StiefelFactor(stored, True, "Vt"), StiefelFactor(nn.Parameter(Q), False, "U")])
    assert found["Vt"] == pytest.approx(3 * math.sqrt(3), rel=1e-6)  # ‖4 I − I‖
    assert found["U"] < 100 * EPS


def trained(geometry: str) -> tuple[nn.Module, Recorder]:
    model = nn.Sequential(StellaLinear(nn.Linear(12, 10), r=3), nn.Tanh(), StellaLinear(nn.Linear(10, 6), r=2))
    recorder = Recorder(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    attach(optimizer, model, grad_scaling=False, geometry=geometry)
    x, target = torch.randn(32, 12), torch.randn(32, 6)
    recorder.record(0)
    for step in range(1, 21):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        if step % 10 == 0:
            recorder.record(step)
    return model, recorder


def test_recorder_follows_training() -> None:
    model, recorder = trained("stiefel")
    names = [f.name for f in stiefel_factors(model)]
    assert [record.step for record in recorder.history] == [0, 10, 20]
    for record in recorder.history:
        assert list(record.orthonormality) == list(record.angles) == names
        assert max(record.orthonormality.values()) < 1e-5
    first, last = recorder.history[0], recorder.history[-1]
    assert max(float(a.max()) for a in first.angles.values()) < 100 * EPS
    assert min(float(a.max()) for a in last.angles.values()) > 1e-4
    assert last.angles["0.U"].shape == (3,)
    assert last.orthonormality == orthonormality(model)
    _, loose = trained("euclidean")
    assert max(loose.history[-1].orthonormality.values()) > 1e-4  # so the bound above says something


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_writes_a_figure(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    _, recorder = trained("stiefel")
    path = recorder.plot(tmp_path / f"training.{ending}")
    content = path.read_bytes()
    assert len(content) > 5000
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    if ending == "svg":  # a line for each of 4 factors on both axes, and the median
        assert content.count(b'clip-path="url(') >= 9


def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (nn.Linear(3, 3), [], [nn.Parameter(torch.eye(3))]):
        with pytest.raises(ValueError, match="target: found"):
            Recorder(target)  # type: ignore[arg-type]
    Q = orthonormal(5, 2)
    with pytest.raises(ValueError, match=r"now, start: found shapes \(5, 2\) and \(5, 1\)"):
        principal_angles(Q, Q[:, :1])
    with pytest.raises(TypeError, match="start: found"):
        principal_angles(Q, Q.long())
    with pytest.raises(ValueError, match="now: found"):
        principal_angles(Q.mT, Q.mT)
    recorder = Recorder([StiefelFactor(nn.Parameter(Q), False, "U")])
    with pytest.raises(ValueError, match="history: found nothing"):
        recorder.plot(tmp_path / "x.png")
    recorder.record(0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install stella_kernels\[plot\]"):
        recorder.plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_is_public() -> None:
    assert sk.diagnostics.Recorder is Recorder
    assert "diagnostics" in sk.__all__


# One call that says whether all is well


def test_check_names_the_factors_off_the_manifold() -> None:
    model = nn.Sequential(StellaLinear(nn.Linear(30, 20), r=4), StellaLinear(nn.Linear(20, 20), r=20))
    sk.diagnostics.check(model)
    assert sk.diagnostics.off_manifold(model) == {}
    with torch.no_grad():
        model[1].Vt[0] *= 1.01
        model[0].U += 1e-2
    found = sk.diagnostics.off_manifold(model)
    assert found.keys() == {"0.U", "1.Vt"}
    assert found["1.Vt"] == orthonormality(model)["1.Vt"]
    with pytest.raises(ValueError, match=r"target: found 0\.U .*, 1\.Vt .*polar"):  # the worst first
        sk.diagnostics.check(model)
    with pytest.raises(ValueError, match=r"1\.Vt"):
        sk.diagnostics.check(stiefel_factors(model)[3:])
    sk.diagnostics.check(stiefel_factors(model)[1:3])
    with torch.no_grad():
        model[0].Vt[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"0\.Vt \(‖QᵀQ − I‖ = nan\), wanted") as raised:
        sk.diagnostics.check(model)
    assert raised.value.names == ("0.Vt",)
    with pytest.raises(ValueError, match="add adapters first"):
        sk.diagnostics.check(nn.Linear(3, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "r"), [(512, 1), (512, 64), (64, 64)])
def test_check_knows_round_off_from_a_move(dtype: torch.dtype, n: int, r: int) -> None:
    layer = StellaLinear(nn.Linear(n, n), r=r, dtype=dtype)
    sk.diagnostics.check(layer)
    with torch.no_grad():
        # ‖QᵀQ − I‖ = 2 · 8 eps sqrt(n) sqrt(r), and (2 + 8 sqrt(n)) eps sqrt(r) is allowed at most
        layer.U.mul_(1 + 8 * torch.finfo(dtype).eps * n**0.5)
    with pytest.raises(ValueError, match="U"):
        sk.diagnostics.check(layer)

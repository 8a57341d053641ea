"""``coupled=True``: the Riemannian gradient from the gradient of S, where that is the same; a word where it is not."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stella_kernels.checks import NonFiniteError
from stella_kernels.nn import StellaLinear, StiefelFactor, stiefel_factors
from stella_kernels.optim import StellaAdamW
from tests.optim.stiefel_problem import F64, Model, distance, identical, values
from tests.random_matrices import orthonormal

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]


class Net(nn.Module):
    """Two StellaLinear layers with S far from symmetric, so that a transpose in the wrong place shows."""

    def __init__(self, dropout: float = 0.0, diag_second: bool = False, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.first = StellaLinear(nn.Linear(11, 14, dtype=dtype), r=4, dropout=dropout, dtype=dtype)
        self.second = StellaLinear(
            nn.Linear(14, 6, dtype=dtype), r=3, alpha=5.0, dropout=dropout, diag_s=diag_second, dtype=dtype
        )
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.S.copy_(torch.randn_like(layer.S))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def loss(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(9, 11, generator=generator, dtype=F64).to(self.first.S.dtype)
        torch.manual_seed(100 + index)  # of the dropout
        return (self(x) - 1).square().sum()


def couplings_of(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Which factors come with a coupling, for each call of the operator."""
    seen: list[list[bool]] = []
    operator = torch.ops.stella_kernels.stella_adamw_

    def watched(*args: Any) -> Tensor:
        seen.append([K.numel() > 0 for K in args[4]])
        return operator(*args)

    monkeypatch.setattr(torch.ops.stella_kernels, "stella_adamw_", watched)
    return seen


def optimizer_of(net: nn.Module, **kwargs: Any) -> StellaAdamW:
    return StellaAdamW(net, **{"lr": 1e-2, "grad_scaling": 14, **kwargs})


def train(net: Net, optimizer: StellaAdamW, steps: int, change: Callable[[Net, int], None] | None = None) -> None:
    for index in range(steps):
        optimizer.zero_grad()
        net.loss(index).backward()
        if change is not None:
            change(net, index)
        optimizer.step()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_of_s_gives_both_couplings(dropout: float) -> None:
    """∇_Uᵀ U = S ∂Sᵀ and ∇_Vᵀ V = Sᵀ ∂S through the layer: accumulated over micro-batches, scaled, clipped by norm.

    Sums of 9 rows over lengths of at most 14 on either side: some ten roundings relative to ‖∇‖, 1e-13 allows 450.
    """
    net = Net(dropout)
    for index in range(3):
        (1024.0 * net.loss(index)).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    for layer in (net.first, net.second):
        U, S, Vt = layer.U, layer.S, layer.Vt
        assert U.grad is not None
        assert S.grad is not None
        assert Vt.grad is not None
        with torch.no_grad():
            for K, gradient, Y in ((S @ S.grad.mT, U.grad, U), (S.mT @ S.grad, Vt.grad.mT, Vt.mT)):
                direct = gradient.mT @ Y
                bound = float(torch.linalg.norm(gradient))
                assert float(torch.linalg.norm(K - direct)) < 1e-13 * bound
                assert float(torch.linalg.norm(direct)) > 1e-3 * bound  # not both nothing
                assert float(torch.linalg.norm(K.mT - direct)) > 1e-3 * bound  # nor symmetric


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_coupled_steps_equal_direct_ones(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps: 1e-10 is 1e5 roundings, room for the amplification by the problem, and no more."""
    direct, coupled = Net(dropout), Net(dropout)
    coupled.load_state_dict(direct.state_dict())
    start = values(direct)
    train(direct, optimizer_of(direct), 30)
    seen = couplings_of(monkeypatch)
    optimizer = optimizer_of(coupled, coupled=True)
    train(coupled, optimizer, 30)
    assert seen == [[True] * 4] * 30
    assert optimizer.coupled_reason == {}
    assert distance(values(coupled), values(direct)) < 1e-10
    assert distance(values(direct), start) > 1e-2


def test_coupled_through_the_peft_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from stella_kernels.peft import StellaConfig

    base = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    config = StellaConfig(r=3, target_modules=["0", "2"], lora_dropout=0.25)
    models = [get_peft_model(copy.deepcopy(base), config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    seen = couplings_of(monkeypatch)
    x, target = torch.randn(8, 10, dtype=F64), torch.randn(8, 7, dtype=F64)
    for model, coupled in zip(models, (False, True), strict=True):
        optimizer = StellaAdamW(model, lr=1e-2, grad_scaling=12, coupled=coupled)
        assert optimizer.coupled_reason == {}
        for index in range(10):
            torch.manual_seed(index)
            optimizer.zero_grad()
            (model(x) - target).square().sum().backward()
            optimizer.step()
    assert seen == [[False] * 4] * 10 + [[True] * 4] * 10
    assert distance(values(models[1]), values(models[0])) < 1e-10


def test_mixed_precision_is_not_taken_for_a_changed_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters computed in bfloat16 round ∇ and ∂S: within the tolerance of the check (warnings are errors here)."""
    net = Net(dtype=torch.float32)
    seen = couplings_of(monkeypatch)
    optimizer = optimizer_of(net, coupled=True)
    for index in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net.loss(index)
        loss.backward()
        optimizer.step()
    assert seen == [[True] * 4] * 8


def add_a_penalty(net: Net, index: int) -> None:
    assert net.first.Vt.grad is not None
    net.first.Vt.grad.add_(net.first.Vt.detach(), alpha=3.0)


@pytest.mark.parametrize("first", [0, 3])
def test_a_changed_gradient_is_named_and_stepped_directly(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One factor is checked in turn after the first step, so within four steps; from there on at every step."""
    direct, coupled = Net(), Net()
    coupled.load_state_dict(direct.state_dict())

    def change(net: Net, index: int) -> None:
        if index >= first:
            add_a_penalty(net, index)

    train(direct, optimizer_of(direct), first + 5, change)
    seen = couplings_of(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"coupled: the gradients of first\.Vt disagree with that of their S"):
        train(coupled, optimizer_of(coupled, coupled=True), first + 5, change)
    assert seen[:first] == [[True] * 4] * first
    found = seen.index([False] * 4)
    assert first <= found < first + 4
    assert seen[found:] == [[False] * 4] * len(seen[found:])
    if found == first:
        assert distance(values(coupled), values(direct)) < 1e-10


def test_clipped_elements_are_noticed() -> None:
    net = Net()
    optimizer = optimizer_of(net, coupled=True)
    net.loss(0).backward()
    largest = max(float(p.grad.abs().max()) for p in net.parameters() if p.grad is not None)
    nn.utils.clip_grad_value_(net.parameters(), 0.05 * largest)
    with pytest.warns(RuntimeWarning, match="elementwise clipping"):
        optimizer.step()


def test_s_without_gradient_steps_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimizer = optimizer_of(net, coupled=True)
    seen = couplings_of(monkeypatch)
    net.loss(0).backward()
    net.first.S.grad = None
    optimizer.step()
    assert seen == [[False, False, True, True]]


def test_a_nan_in_the_gradient_of_s_does_not_reach_the_factors() -> None:
    for kind in (False, True):
        net = Net()
        before = values(net)
        optimizer = optimizer_of(net, coupled=kind)
        net.loss(0).backward()
        assert net.first.S.grad is not None
        net.first.S.grad[0, 0] = math.nan
        with pytest.raises(NonFiniteError, match=r"the gradient of the S beside first\.U holds NaN"):
            optimizer.step()
        assert identical(values(net), before)


def test_it_says_why_a_factor_is_not_coupled(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(diag_second=True)
    optimizer = optimizer_of(net, coupled=True)
    assert set(optimizer.coupled_reason) == {"second.U", "second.Vt"}
    assert all("diagonal" in reason for reason in optimizer.coupled_reason.values())
    seen = couplings_of(monkeypatch)
    train(net, optimizer, 2)
    assert seen == [[True, True, False, False]] * 2
    assert optimizer_of(net).coupled_reason == {}


class Shared(nn.Module):
    """Two adapters that share U: its gradient is the sum over both, and belongs to neither S."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (StellaLinear(nn.Linear(7, 9, dtype=F64), r=2, dtype=F64) for _ in range(2))
        self.two.U = self.one.U


class SharedCore(Shared):
    """Two adapters that share S instead."""

    def __init__(self) -> None:
        super().__init__()
        self.two.U = nn.Parameter(self.two.U.detach().clone())
        self.two.S = self.one.S


class Bare(nn.Module):
    """Says nothing of an S."""

    def __init__(self) -> None:
        super().__init__()
        self.Y = nn.Parameter(orthonormal(8, 2))

    def own_stiefel_factors(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        yield "Y", self.Y, False


def frozen_core() -> nn.Module:
    net = Net()
    net.first.S.requires_grad_(False)
    return net


def half() -> nn.Module:
    return StellaLinear(nn.Linear(7, 9), r=2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (frozen_core, "first.U", "its S is frozen"),
        (Shared, "one.U", "a factor shared by adapters"),
        (SharedCore, "two.Vt", "its S serves several adapters"),
        (Bare, "Y", "the module does not say which S"),
        (Model, "first.U", "the module does not say which S"),
        (half, "U", r"it is torch\.bfloat16 and its S torch\.bfloat16, wanted both float32"),
    ],
)
def test_reasons(make: Callable[[], nn.Module], name: str, reason: str) -> None:
    model = make()
    sound = Net()
    both = nn.ModuleDict({"model": model, "sound": sound})
    optimizer = optimizer_of(both, coupled=True)
    assert "sound.first.U" not in optimizer.coupled_reason
    assert reason.replace("\\", "") in optimizer.coupled_reason[f"model.{name}"]
    if len(stiefel_factors(model)) == len([n for n in optimizer.coupled_reason if n.startswith("model.")]):
        with pytest.raises(ValueError, match=rf"coupled: no factor can take .* cannot because .*{reason}"):
            optimizer_of(model, coupled=True)


def test_s_in_another_optimizer() -> None:
    net = Net()
    factors = stiefel_factors(net)
    with pytest.raises(ValueError, match="its S is not in this optimizer"):
        StellaAdamW([f.parameter for f in factors], weight_decay=0.0, factors=factors, grad_scaling=False, coupled=True)
    bare = [StiefelFactor(f.parameter, f.transposed, f.name) for f in factors]
    with pytest.raises(ValueError, match="coupled: no factor"):
        StellaAdamW(net, factors=bare, grad_scaling=False, coupled=True)


def test_copies_stay_coupled(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimizer = optimizer_of(net, coupled=True)
    train(net, optimizer, 2)
    twin, other = copy.deepcopy((net, optimizer))
    seen = couplings_of(monkeypatch)
    for n, o in ((net, optimizer), (twin, other)):
        train(n, o, 2)
    assert seen == [[True] * 4] * 4
    assert identical(values(twin), values(net))


def test_no_warning_without_cause() -> None:
    """Many steps in float32 at a high rate, where rounding is largest."""
    net = Net(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer_of(net, coupled=True, lr=5e-2), 100)

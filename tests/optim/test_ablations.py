"""Every ablation of the paper runs: each choice with each other one, on a small regression whose loss falls."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from stella_kernels.nn import INITS, StellaLinear, stiefel_factors
from stella_kernels.optim import attach
from stella_kernels.optim.attach import GEOMETRIES
from stella_kernels.reference import stiefel

pytestmark = pytest.mark.usefixtures("one_thread")


class Regression(nn.Module):
    """One adapted layer that is to learn a change of rank 3 of its base."""

    def __init__(self, init: str, diag_s: bool) -> None:
        super().__init__()
        self.config = {"hidden_size": 12}
        self.layer = StellaLinear(nn.Linear(12, 10), r=3, init=init, diag_s=diag_s)
        change = torch.randn(10, 3) @ torch.randn(3, 12) / 3
        self.x = torch.randn(64, 12)
        self.target = (self.layer.base(self.x) + self.x @ change.mT).detach()

    def loss(self) -> torch.Tensor:
        return (self.layer(self.x) - self.target).square().mean()


@pytest.mark.parametrize("diag_s", [False, True])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("retraction", sorted(stiefel.RETRACTIONS))
def test_the_loss_falls(retraction: str, geometry: str, init: str, diag_s: bool) -> None:
    if geometry == "quotient" and diag_s:
        pytest.skip("a diagonal S has no quotient, which test_optim_quotient shows to be refused")
    for grad_scaling in (True, False, 5.0):
        model = Regression(init, diag_s)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.06, weight_decay=0.0)
        attach(optimizer, model, retraction=retraction, geometry=geometry, grad_scaling=grad_scaling)
        first = float(model.loss().detach())
        for _ in range(12):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
        assert float(model.loss().detach()) < 0.9 * first
        error = max(float(stiefel.orthonormality_error(f.view.double())) for f in stiefel_factors(model))
        # 12 steps of float32 that drift (exp_map, cayley) or not, each by some sqrt(36) eps
        assert error > 1e-4 if geometry == "euclidean" else error < 12 * 8 * 6 * torch.finfo(torch.float32).eps


def test_the_choices_differ() -> None:
    """Else the test above could pass with every option ignored."""
    torch.manual_seed(11)
    start = Regression("rando", False)
    ends: dict[tuple[str, str, float], torch.Tensor] = {}
    for retraction, geometry, scale in itertools.product(sorted(stiefel.RETRACTIONS), ("stiefel", "quotient"), (5, 20)):
        model = Regression("rando", False)
        model.load_state_dict(start.state_dict())
        model.x, model.target = start.x, start.target
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
        attach(optimizer, model, retraction=retraction, geometry=geometry, grad_scaling=scale)
        for _ in range(5):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
        ends[retraction, geometry, scale] = model.layer.merged_weight()
    for (one, a), (other, b) in itertools.combinations(ends.items(), 2):
        assert float((a - b).norm()) > 1e-5, (one, other)

"""A small least-squares problem over two adapters, and the published step and ours on it, for the optimizers' tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, Optimizer, RMSprop

from stella_kernels.nn import stiefel_factors
from stella_kernels.optim import Attachment, StellaAdamW, attach
from stella_kernels.reference import stiefel
from stella_kernels.reference.step import PublishedStep
from tests.random_matrices import orthonormal

F64 = torch.float64
HIDDEN = 12


class Adapter(nn.Module):
    """x Vᵀ-stored, S, U-stored: one factor of either storage, and a free matrix between them."""

    def __init__(self, m: int, n: int, r: int, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.U = nn.Parameter(orthonormal(m, r, dtype=dtype))
        self.S = nn.Parameter(torch.eye(r, dtype=dtype))
        self.Vt = nn.Parameter(orthonormal(n, r, dtype=dtype).mT.contiguous())

    def own_stiefel_factors(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        for name, parameter, transposed in (("U", self.U, False), ("Vt", self.Vt, True)):
            if parameter.requires_grad:
                yield name, parameter, transposed

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.Vt.mT @ self.S.mT @ self.U.mT


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=HIDDEN)
        self.first, self.second = Adapter(17, 13, 4, dtype), Adapter(9, 17, 3, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Problem:
    """A least-squares problem of which copies in any dtype start from the same point."""

    def __init__(self, batches: int = 50) -> None:
        self.model = Model()
        self.batches = [(torch.randn(24, 13, dtype=F64), torch.randn(24, 9, dtype=F64)) for _ in range(batches)]

    def copy(self, dtype: torch.dtype = F64) -> Model:
        return copy.deepcopy(self.model).to(dtype)

    def loss(self, model: Model, index: int) -> Tensor:
        x, target = (t.to(model.first.S.dtype) for t in self.batches[index % len(self.batches)])
        return (model(x) - target).square().mean() * 9

    def train(self, model: Model, optimizer: Optimizer, step: Callable[[], Any], first: int, last: int) -> None:
        for index in range(first, last):
            optimizer.zero_grad()
            self.loss(model, index).backward()
            step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float(torch.linalg.norm(a[name].double() - b[name].double())) for name in b)


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def published(
    problem: Problem, build: Callable[..., Optimizer], steps: int, dtype: torch.dtype, **kwargs: Any
) -> Model:
    model = problem.copy(dtype)
    optimizer = build(model.parameters())
    stepper = PublishedStep(optimizer, stiefel_factors(model), **kwargs)
    problem.train(model, optimizer, stepper.step, 0, steps)
    return model


def worst_error(model: nn.Module) -> float:
    return max(float(stiefel.orthonormality_error(f.view.double())) for f in stiefel_factors(model))


PLAIN: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.0}


def fused(problem: Problem, steps: int, dtype: torch.dtype = F64, **kwargs: Any) -> tuple[Model, StellaAdamW]:
    model = problem.copy(dtype)
    optimizer = StellaAdamW(model, **{**PLAIN, **kwargs})
    problem.train(model, optimizer, optimizer.step, 0, steps)
    return model, optimizer


def torch_adamw(**kwargs: Any) -> Callable[..., AdamW]:
    return lambda parameters: AdamW(parameters, **{**PLAIN, **kwargs})


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    return copy.deepcopy(optimizer.state_dict()["state"])


def same_state(a: dict[int, dict[str, Tensor]], b: dict[int, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k][key], b[k][key]) for k in b for key in b[k])


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=2e-2, weight_decay=0.0),
    "sgd_momentum": lambda p: SGD(p, lr=5e-2, momentum=0.9),
    "adamw_loop": lambda p: AdamW(p, lr=2e-2, weight_decay=0.0, foreach=False),
    "adamw_foreach": lambda p: AdamW(p, lr=2e-2, weight_decay=0.0, foreach=True),
    "adamw_fused": lambda p: AdamW(p, lr=2e-2, weight_decay=0.0, fused=True),
    "sgd_foreach_maximize": lambda p: SGD(p, lr=1e-3, foreach=True, maximize=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-2),
    "adafactor": lambda p: Adafactor(p, lr=1e-2),
    "nadam_amsgrad_free": lambda p: NAdam(p, lr=1e-2),
    "adam_amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
}


def hooked(
    problem: Problem, build: Callable[..., Optimizer], steps: int, dtype: torch.dtype, **kwargs: Any
) -> tuple[Model, Attachment]:
    model = problem.copy(dtype)
    optimizer = build(model.parameters())
    attachment = attach(optimizer, model, **kwargs)
    problem.train(model, optimizer, optimizer.step, 0, steps)
    return model, attachment

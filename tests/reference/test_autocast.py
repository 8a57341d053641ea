"""The reference under autocast gives the same bits as outside: a factor rounded to bfloat16 is not orthonormal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stella_kernels.nn import StellaLinear, stiefel_factors
from stella_kernels.operators.fallback import REFERENCE
from stella_kernels.optim import StellaAdamW, attach
from stella_kernels.reference import adamw, adapter, autocast, quotient, stiefel
from stella_kernels.reference.step import PublishedStep
from tests.random_matrices import orthonormal

N, M, R, T = 24, 20, 4, 6


def factor(n: int) -> Tensor:
    return orthonormal(n, R).float()


U, V, S = factor(M), factor(N), torch.eye(R) + 0.1 * torch.randn(R, R)
POINT = U, S, V
MOVE = 0.1 * torch.randn(M, R), 0.1 * torch.randn(R, R), 0.1 * torch.randn(N, R)
MOVED = tuple(a + b for a, b in zip(POINT, MOVE, strict=True))
RATES: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 1.0}
ROWS = torch.randn(T, N), torch.randn(T, M)

FUNCTIONS: dict[str, Callable[[], Any]] = {
    "stiefel.riemannian_gradient": lambda: stiefel.riemannian_gradient(U, MOVE[0]),
    "stiefel.tangent_projection": lambda: stiefel.tangent_projection(U, MOVE[0]),
    "stiefel.orthonormality_error": lambda: stiefel.orthonormality_error(U + MOVE[0]),
    "stiefel.polar_factor": lambda: stiefel.polar_factor(U + MOVE[0]),
    "stiefel.polar_retraction": lambda: stiefel.polar_retraction(U, MOVE[0]),
    "stiefel.qr_retraction": lambda: stiefel.qr_retraction(U, MOVE[0]),
    "stiefel.skew_exponential": lambda: stiefel.skew_exponential(S - S.mT),
    "stiefel.exponential_map": lambda: stiefel.exponential_map(U, MOVE[0]),
    "stiefel.cayley_retraction": lambda: stiefel.cayley_retraction(U, MOVE[0]),
    "stiefel.project_retract": lambda: stiefel.project_retract(U, MOVED[0], 2.0, "exp_map"),
    "quotient.metric": lambda: quotient.metric(S),
    "quotient.inner_product": lambda: quotient.inner_product(S, MOVE, MOVE),
    "quotient.vertical": lambda: quotient.vertical(POINT, S - S.mT, S.mT - S),
    "quotient.riemannian_gradient": lambda: quotient.riemannian_gradient(POINT, MOVE),
    "quotient.tangent_projection": lambda: quotient.tangent_projection(POINT, MOVE),
    "quotient.horizontal_projection": lambda: quotient.horizontal_projection(POINT, MOVE),
    "quotient.horizontal_move": lambda: quotient.horizontal_move(POINT, MOVED, 1.0, 2.0),
    "quotient.project_retract": lambda: quotient.project_retract(POINT, MOVED, 1.0, 2.0),
    "adapter.times_core": lambda: adapter.times_core(ROWS[0][:, :R], S),
    "adapter.dropped": lambda: adapter.dropped(ROWS[0], 0.5, torch.tensor(3)),
    "adapter.adapter_forward": lambda: adapter.adapter_forward(ROWS[0], U, S, V.mT, 2.0),
    "adapter.adapter_backward": lambda: adapter.adapter_backward(ROWS[1], ROWS[0], U, S, V.mT, 2.0),
    "adamw.adamw_move": lambda: adamw.adamw_move(U, *MOVED[:1], MOVE[0], MOVE[0].abs(), **RATES),
    "adamw.riemannian_adamw_step": lambda: adamw.riemannian_adamw_step(U, MOVED[0], MOVE[0], MOVE[0].abs(), **RATES),
    "stiefel.symm": lambda: stiefel.symm(S),
}
UNAFFECTED = {"gradient_scaling_divisor", "check_choice", "outside_autocast", "AdapterGradients"}


def listed(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(listed(found), listed(wanted), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    wanted = FUNCTIONS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(FUNCTIONS[name](), wanted)
        assert autocast.autocasts(torch.device("cpu"))  # again, as it was before


def test_no_function_is_left_out() -> None:
    for module in (stiefel, quotient, adapter, adamw):
        room = module.__name__.rsplit(".", 1)[1]
        public = {name for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
        own = {name for name in public - UNAFFECTED if getattr(vars(module)[name], "__module__", "") == module.__name__}
        assert {f"{room}.{name}" for name in own} <= set(FUNCTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", sorted(REFERENCE))
def test_fallback(operator: str, dtype: torch.dtype) -> None:
    u, v, s, x, y = (t.to(dtype) for t in (U, V, S, *ROWS))
    layer = u, s, v.mT, 2.0, 0.5, torch.tensor(3)
    settings = torch.tensor([[1e-2, 0.9, 0.99, 1e-8, 1.0, 1.0, 1.0]], dtype=torch.float64)
    move = MOVE[0].to(dtype)
    sums = REFERENCE["gradient_gram"]([move], [u])
    grams = REFERENCE["retract_gram"]([u + move], [u], [1.0])

    def run() -> list[Tensor]:
        written = [t.clone() for t in (u + move, move, move.abs(), y, x)]
        moved, gradient, square, out, grad_x = written
        arguments: dict[str, tuple[Any, ...]] = {
            "polar": (moved, "auto"),
            "riemannian_gradient_": ([gradient], [u], []),
            "project_retract_": ([moved], [u], [1.0], "auto"),
            "stella_adamw_": ([moved], [move], [gradient], [square], [torch.empty(0)], settings),
            "gradient_gram": ([gradient], [u]),
            "riemannian_gradient_rows_": ([gradient], [u], [], sums),
            "retract_gram": ([moved], [u], [1.0]),
            "retract_rows_": ([moved], [u], [1.0], sums, grams),
            "adamw_gram_": ([moved], [move], [gradient], [square], sums, settings),
            "adamw_rows_": ([moved], move.to(sums.dtype).reshape(-1), sums, grams),
            "philox_dropout": (x, 0.5, torch.tensor(3)),
            "adapter_forward_": (out, x, *layer),
            "adapter_product": (x, None, *layer),
            "adapter_backward_": (grad_x, 1.0, y, x, x[:, :R].contiguous(), *layer, [True] * 3),
        }
        return [*listed(REFERENCE[operator](*arguments[operator])), *written]

    wanted = run()
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else torch.float16):
        assert_same(run(), wanted)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = StellaLinear(nn.Linear(N, M), r=R)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def published(model: Model, geometry: str) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return PublishedStep(optimizer, stiefel_factors(model), hidden_size=N, geometry=geometry).step


def attached(model: Model, **options: Any) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attachment = attach(optimizer, model, grad_scaling=False, **options)

    def step() -> None:
        assert attachment is not None
        optimizer.step()

    return step


STEPS: dict[str, Callable[[Model], Callable[[], Any]]] = {
    "published": lambda model: published(model, "stiefel"),
    "published quotient": lambda model: published(model, "quotient"),
    "polar": lambda model: attached(model),
    "exp_map": lambda model: attached(model, retraction="exp_map"),
    "qr": lambda model: attached(model, retraction="qr"),
    "cayley": lambda model: attached(model, retraction="cayley"),
    "quotient": lambda model: attached(model, geometry="quotient"),
    "adamw": lambda model: StellaAdamW(model, grad_scaling=False).step,
    "adamw coupled": lambda model: StellaAdamW(model, grad_scaling=False, coupled=True).step,
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("error")
def test_whole_step(name: str) -> None:
    model = Model()
    other = copy.deepcopy(model)
    x = torch.randn(8, N)
    for each, inside in ((model, False), (other, True)):
        step = STEPS[name](each)
        for _ in range(2):
            each.zero_grad()
            each(x).square().sum().backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                step()
    assert_same(list(other.parameters()), list(model.parameters()))


def test_merged_weight() -> None:
    layer = Model().layer
    wanted = layer.merged_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(layer.merged_weight(), wanted)

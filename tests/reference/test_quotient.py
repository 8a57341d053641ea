"""Laws of the quotient geometry: what is vertical vanishes, what is horizontal stays, and fibres go to fibres."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stella_kernels.reference import quotient, stiefel
from stella_kernels.reference.quotient import Triple
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
SHAPES = [(12, 9, 4), (4, 7, 4), (5, 5, 5), (6, 8, 1)]  # m, n, r: also square factors, and r = 1 (no fibre but signs)
CORES = ["identity", "random", "ill-conditioned", "rank-deficient", "zero"]


def core(name: str, r: int) -> Tensor:
    singular = {
        "identity": torch.ones(r, dtype=F64),
        "random": torch.rand(r, dtype=F64) + 0.5,
        "ill-conditioned": torch.logspace(0, -4, r, dtype=F64),
        "rank-deficient": torch.cat([torch.ones(r // 2, dtype=F64), torch.zeros(r - r // 2, dtype=F64)]),
        "zero": torch.zeros(r, dtype=F64),
    }[name]
    return (orthonormal(r, r) * singular) @ orthonormal(r, r).mT


def point(m: int, n: int, r: int, name: str = "random") -> Triple:
    return orthonormal(m, r), core(name, r), orthonormal(n, r)


def noise(at: Triple) -> Triple:
    U, S, V = (torch.randn_like(t) for t in at)
    return U, S, V


def skew(r: int) -> Tensor:
    M = torch.randn(r, r, dtype=F64)
    return M - M.mT


def size(xi: Triple) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in xi))


def difference(a: Triple, b: Triple) -> float:
    return math.sqrt(sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)))


# r ≤ 5 and m, n ≤ 12: 1e3 eps for the products, and the damped systems have a condition of at most (2σ² + δ)/δ = 2e4
EXACT = 1e3 * torch.finfo(F64).eps
SOLVED = EXACT * 2 / quotient.DAMPING


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_tangent_projection_is_orthogonal_onto_the_tangent_space(m: int, n: int, r: int, name: str) -> None:
    at = point(m, n, r, name)
    delta = noise(at)
    xi = quotient.tangent_projection(at, delta)
    for Y, move in ((at[0], xi[0]), (at[2], xi[2])):
        assert torch.linalg.norm(stiefel.symm(Y.mT @ move)) < EXACT
    assert difference(quotient.tangent_projection(at, xi), xi) < EXACT
    removed = (delta[0] - xi[0], delta[1] - xi[1], delta[2] - xi[2])
    assert size(removed) > 0.1
    other = quotient.tangent_projection(at, noise(at))
    assert abs(float(quotient.inner_product(at[1], removed, other))) < EXACT * size(removed) * size(other)


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_a_quotient_step_does_not_move_along_the_fibre(m: int, n: int, r: int, name: str) -> None:
    at = point(m, n, r, name)
    moved = tuple(t + d for t, d in zip(at, noise(at), strict=True))
    xi = quotient.horizontal_move(at, moved, 1.3, 0.7)  # type: ignore[arg-type]
    along = quotient.vertical(at, skew(r), skew(r))
    assert abs(float(quotient.inner_product(at[1], xi, along))) < SOLVED * size(xi) * max(size(along), 1.0)
    for Y, move in ((at[0], xi[0]), (at[2], xi[2])):
        assert torch.linalg.norm(stiefel.symm(Y.mT @ move)) < SOLVED


def test_a_stiefel_step_does_move_along_the_fibre() -> None:
    """Else the test above could not fail: the projection to the two Stiefel manifolds alone keeps a vertical part."""
    at = point(12, 9, 4)
    U, S, V = noise(at)
    step = stiefel.tangent_projection(at[0], U), S, stiefel.tangent_projection(at[2], V)
    along = quotient.vertical(at, skew(4), skew(4))
    assert abs(float(quotient.inner_product(at[1], step, along))) > 1e-3


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_vertical_vectors_vanish_and_horizontal_ones_stay(m: int, n: int, r: int, name: str) -> None:
    at = point(m, n, r, name)
    along = quotient.vertical(at, skew(r), skew(r))
    assert size(quotient.horizontal_projection(at, along)) < SOLVED * max(size(along), 1.0)
    xi = quotient.horizontal_projection(at, quotient.tangent_projection(at, noise(at)))
    assert size(xi) > 0.1
    assert difference(quotient.horizontal_projection(at, xi), xi) < SOLVED * size(xi)
    mixed = tuple(x + v for x, v in zip(xi, along, strict=True))
    assert difference(quotient.horizontal_projection(at, mixed), xi) < SOLVED * (size(xi) + size(along))  # type: ignore[arg-type]


def test_vertical_vectors_leave_the_product_unchanged() -> None:
    """To first order, by the product rule; and horizontal ones of the same size do change it."""

    def change(at: Triple, xi: Triple) -> float:
        U, S, V = at
        return float(torch.linalg.norm(xi[0] @ S @ V.mT + U @ xi[1] @ V.mT + U @ S @ xi[2].mT))

    at = point(12, 9, 4)
    along = quotient.vertical(at, skew(4), skew(4))
    assert change(at, along) < EXACT * size(along)
    xi = quotient.horizontal_projection(at, quotient.tangent_projection(at, noise(at)))
    assert change(at, xi) > 0.1 * size(xi)


def test_riemannian_gradient_represents_the_derivative_and_is_horizontal() -> None:
    """f(U, S, V) = <C, U S Vᵀ>: g(grad f, ξ) = Df[ξ] for tangent ξ, and nothing of grad f lies along the fibre."""
    at = point(12, 9, 4)
    U, S, V = at
    C = torch.randn(12, 9, dtype=F64)
    euclidean = C @ V @ S.mT, U.mT @ C @ V, C.mT @ U @ S
    gradient = quotient.riemannian_gradient(at, euclidean)
    xi = quotient.tangent_projection(at, noise(at))
    derivative = sum(float((e * x).sum()) for e, x in zip(euclidean, xi, strict=True))
    tolerance = SOLVED * size(gradient) * size(xi)
    assert float(quotient.inner_product(S, gradient, xi)) == pytest.approx(derivative, abs=tolerance)
    assert difference(quotient.horizontal_projection(at, gradient), gradient) < SOLVED * size(gradient)
    assert difference(gradient, euclidean) > 0.1


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("retraction", ["polar", "exp_map", "cayley"])
def test_corresponding_steps_from_one_fibre_reach_one_fibre(retraction: str, name: str) -> None:
    at = point(12, 9, 4, name)
    delta = noise(at)
    O, P = orthonormal(4, 4), orthonormal(4, 4)  # noqa: E741

    def turned(t: Triple) -> Triple:
        return t[0] @ O, O.mT @ t[1] @ P, t[2] @ P

    def product(start: Triple, move: Triple) -> Tensor:
        moved = tuple(t + 0.3 * d for t, d in zip(start, move, strict=True))
        U, S, V = quotient.project_retract(start, moved, 1.3, 0.7, retraction)  # type: ignore[arg-type]
        assert float(stiefel.orthonormality_error(U)) < EXACT * 10
        assert float(stiefel.orthonormality_error(V)) < EXACT * 10
        return U @ S @ V.mT

    there = product(at, delta)
    assert torch.linalg.norm(there - at[0] @ at[1] @ at[2].mT) > 0.1  # it did move
    assert torch.linalg.norm(product(turned(at), turned(delta)) - there) < SOLVED * 10
    gradient = quotient.riemannian_gradient(at, delta)
    other = quotient.riemannian_gradient(turned(at), turned(delta))
    assert difference(other, turned(gradient)) < SOLVED * size(gradient)


def test_batched_equals_loop() -> None:
    at = orthonormal(3, 12, 4), torch.randn(3, 4, 4, dtype=F64), orthonormal(3, 9, 4)
    moved = tuple(t + 0.3 * d for t, d in zip(at, noise(at), strict=True))
    batched = quotient.project_retract(at, moved, 1.3, 0.7)  # type: ignore[arg-type]
    for i in range(3):
        alone = quotient.project_retract(*[tuple(t[i] for t in ts) for ts in (at, moved)], 1.3, 0.7)  # type: ignore[arg-type]
        assert difference(tuple(t[i] for t in batched), alone) < SOLVED  # type: ignore[arg-type]


def test_unknown_retraction_is_refused() -> None:
    at = point(5, 6, 2)
    with pytest.raises(ValueError, match="retraction: found 'svd', wanted one of 'polar'"):
        quotient.project_retract(at, at, 1.0, 1.0, "svd")

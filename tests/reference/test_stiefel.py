"""Laws of the Stiefel geometry that hold whatever the code: the reference is judged by mathematics, not by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stella_kernels.reference import stiefel
from tests.random_matrices import orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float64).eps
SHAPES = [(20, 4), (7, 4), (5, 4), (4, 4), (9, 1), (1, 1)]  # n >= 2r, n < 2r, n == r, one column
RETRACTIONS = sorted(stiefel.RETRACTIONS)

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 8), st.integers(0, 12)).map(lambda t: (t[0] + t[1], t[0]))  # (n, r), n >= r
few = settings(max_examples=25, deadline=None)


def tangent(Y: Tensor, norm: float = 1.0) -> Tensor:
    """A random tangent vector at Y, Y A + (I − YYᵀ) K with A skew, of the given Frobenius norm for each matrix."""
    A, K = torch.randn(*Y.shape[:-2], Y.shape[-1], Y.shape[-1], dtype=Y.dtype), torch.randn_like(Y)
    delta = Y @ (A - A.mT) + K - Y @ (Y.mT @ K)
    size = torch.linalg.matrix_norm(delta)[..., None, None]
    delta = norm * delta / size.clamp_min(1e-3)  # St(1, 1) has the zero vector only
    # Where K was nearly a Y S, dividing by what was left of it magnified its round-off: off with it, twice is enough.
    return delta - Y @ (Y.mT @ delta + delta.mT @ Y) / 2


def generator(Y: Tensor, delta: Tensor) -> Tensor:
    """The n × n skew W with W Y = Δ that both the canonical geodesic and the Cayley transform are defined by."""
    P = torch.eye(Y.shape[-2], dtype=Y.dtype) - Y @ Y.mT / 2
    return P @ delta @ Y.mT - Y @ delta.mT @ P


def roundoff(n: int, r: int, norm: float = 1.0) -> float:
    """64 eps sqrt(nr) (1 + ‖Δ‖)²: r products of length n, a factorisation, and operands that grow with Δ."""
    return 64 * EPS * math.sqrt(n * r) * (1 + norm) ** 2


@pytest.mark.parametrize(("n", "r"), SHAPES)
@pytest.mark.parametrize("norm", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("name", RETRACTIONS)
def test_retraction_lands_on_the_manifold(name: str, norm: float, n: int, r: int) -> None:
    Y = orthonormal(n, r)
    Q = stiefel.RETRACTIONS[name](Y, tangent(Y, norm))
    assert Q.shape == Y.shape
    assert float(stiefel.orthonormality_error(Q)) < roundoff(n, r, norm)


@pytest.mark.parametrize(("n", "r"), SHAPES)
@pytest.mark.parametrize("name", RETRACTIONS)
def test_retraction_of_zero_is_the_point(name: str, n: int, r: int) -> None:
    Y = orthonormal(n, r)
    assert torch.linalg.norm(stiefel.RETRACTIONS[name](Y, torch.zeros_like(Y)) - Y) < roundoff(n, r)


@pytest.mark.parametrize("zero", [0, 1, 3, 19])
@pytest.mark.parametrize("name", RETRACTIONS)
def test_rows_of_zeros_stay_exactly_zero(name: str, zero: int) -> None:
    others = torch.arange(20) != zero
    Y, delta = torch.zeros(2, 20, 4, dtype=torch.float64)
    Y[others] = orthonormal(19, 4)
    delta[others] = tangent(Y[others])
    Q = stiefel.RETRACTIONS[name](Y, delta)
    assert torch.equal(Q[zero], torch.zeros(4))
    wanted = stiefel.RETRACTIONS[name](Y[others], delta[others])
    assert torch.linalg.norm(Q[others] - wanted) < roundoff(20, 4)


@pytest.mark.parametrize(("n", "r"), [s for s in SHAPES if s != (1, 1)])
@pytest.mark.parametrize("name", RETRACTIONS)
def test_retraction_is_first_order(name: str, n: int, r: int) -> None:
    """‖R(tΔ) − Y − tΔ‖ = c t² + O(t³), so halving t divides it by 4, up to O(t) = 1e-3 relative."""
    Y = orthonormal(n, r)
    delta = tangent(Y)
    errors = [float(torch.linalg.norm(stiefel.RETRACTIONS[name](Y, t * delta) - Y - t * delta)) for t in (2e-3, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.02)


@few
@given(seed=seeds, size=st.integers(1, 10), exponent=st.integers(-12, 3))
def test_skew_exponential(seed: int, size: int, exponent: int) -> None:
    """Against its Taylor series (60 terms of norm 8^k / k! at most, summed with e^8 eps), and orthogonal."""
    torch.manual_seed(seed)
    X = torch.randn(size, size, dtype=torch.float64)
    X = X - X.mT
    X *= 2.0**exponent / max(float(torch.linalg.norm(X)), 1.0)
    series = term = torch.eye(size, dtype=torch.float64)
    for k in range(1, 60):
        term = term @ X / k
        series = series + term
    exponential = stiefel.skew_exponential(X)
    assert float(stiefel.orthonormality_error(exponential)) < roundoff(size, size)
    assert torch.linalg.norm(exponential - series) < roundoff(size, size) * math.exp(2.0**exponent)


@pytest.mark.parametrize(("n", "r"), SHAPES)
def test_exponential_map_is_the_dense_exponential(n: int, r: int) -> None:
    Y = orthonormal(n, r)
    delta = tangent(Y, 2.0)
    dense = stiefel.skew_exponential(generator(Y, delta)) @ Y
    assert torch.linalg.norm(stiefel.exponential_map(Y, delta) - dense) < roundoff(n, r, 2.0)


@pytest.mark.parametrize(("n", "r"), SHAPES)
def test_cayley_is_the_dense_cayley_transform(n: int, r: int) -> None:
    Y = orthonormal(n, r)
    delta = tangent(Y, 2.0)
    W, identity = generator(Y, delta), torch.eye(n, dtype=Y.dtype)
    dense = torch.linalg.solve(identity - W / 2, (identity + W / 2) @ Y)
    assert torch.linalg.norm(stiefel.cayley_retraction(Y, delta) - dense) < roundoff(n, r, 2.0)


@pytest.mark.parametrize(("n", "r"), [(20, 4), (7, 4), (4, 4), (9, 1)])
def test_exponential_map_is_a_geodesic_of_constant_speed(n: int, r: int) -> None:
    """Its canonical speed stays that of Δ, and going on from any of its points with the velocity there stays on it.

    The velocity is a central difference with h = 1e-5: off by h² = 1e-10 and eps/h = 2e-11, times small factors.
    """
    Y, h = orthonormal(n, r), 1e-5
    delta = tangent(Y)

    def speed(at: Tensor, velocity: Tensor) -> float:
        half = at.mT @ velocity
        return float((velocity * velocity).sum() - (half * half).sum() / 2)

    for t in (0.3, 1.0, 2.5):
        middle = stiefel.exponential_map(Y, t * delta)
        ahead, behind = (stiefel.exponential_map(Y, (t + s) * delta) for s in (h, -h))
        velocity = (ahead - behind) / (2 * h)
        assert speed(middle, velocity) == pytest.approx(speed(Y, delta), rel=1e-7)
        onward = stiefel.exponential_map(middle, stiefel.tangent_projection(middle, 0.5 * velocity))
        assert torch.linalg.norm(onward - stiefel.exponential_map(Y, (t + 0.5) * delta)) < 1e-7


@pytest.mark.parametrize("zeroed", [[0], [1, 2], [0, 1, 2, 3]])
def test_exponential_map_with_a_rank_deficient_normal_part(zeroed: list[int]) -> None:
    Y = orthonormal(20, 4)
    K = torch.randn(20, 4, dtype=torch.float64)
    K[:, zeroed] = 0
    A = torch.randn(4, 4, dtype=torch.float64)
    delta = Y @ (A - A.mT) + K - Y @ (Y.mT @ K)
    Q = stiefel.exponential_map(Y, delta)
    norm = float(torch.linalg.norm(delta))
    assert float(stiefel.orthonormality_error(Q)) < roundoff(20, 4, norm)
    assert torch.linalg.norm(Q - stiefel.skew_exponential(generator(Y, delta)) @ Y) < roundoff(20, 4, norm)


@pytest.mark.parametrize("name", RETRACTIONS)
def test_batched_equals_loop(name: str) -> None:
    Y = orthonormal(2, 3, 11, 4)
    moved = Y + 0.3 * torch.randn_like(Y)
    batched = stiefel.project_retract(Y, moved, 1.7, name)
    assert batched.shape == Y.shape
    for i in range(2):
        for j in range(3):
            alone = stiefel.project_retract(Y[i, j], moved[i, j], 1.7, name)
            assert torch.linalg.norm(batched[i, j] - alone) < roundoff(11, 4, 2.0)


@pytest.mark.parametrize("name", RETRACTIONS)
@pytest.mark.parametrize("shape", [(0, 9, 3), (2, 0, 9, 3)])
def test_empty_batch(name: str, shape: tuple[int, ...]) -> None:
    Y = torch.empty(shape, dtype=torch.float64)
    assert stiefel.project_retract(Y, Y, 1.0, name).shape == shape
    assert stiefel.orthonormality_error(Y).shape == shape[:-2]


def test_qr_retraction_has_a_positive_diagonal() -> None:
    Y = orthonormal(30, 6, 3)
    M = Y + tangent(Y, 2.0)
    R = stiefel.qr_retraction(Y, M - Y).mT @ M  # (30, 3, 3), upper triangular
    assert bool((R.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert float(R.tril(-1).abs().max()) < roundoff(6, 3, 2.0)


@few
@given(seed=seeds, shape=shapes)
def test_polar_factor_leaves_a_symmetric_positive_part(seed: int, shape: tuple[int, int]) -> None:
    """M = uf(M) H with H = uf(M)ᵀ M symmetric and positive semidefinite: this defines uf(M) for full rank."""
    torch.manual_seed(seed)
    M = torch.randn(shape, dtype=torch.float64)
    Q = stiefel.polar_factor(M)
    H, size = Q.mT @ M, float(torch.linalg.norm(M))
    assert float(stiefel.orthonormality_error(Q)) < roundoff(*shape)
    assert torch.linalg.norm(H - H.mT) < roundoff(*shape) * size
    assert float(torch.linalg.eigvalsh(stiefel.symm(H)).min()) > -roundoff(*shape) * size
    assert torch.linalg.norm(Q @ H - M) < roundoff(*shape) * size


@few
@given(seed=seeds, shape=shapes, exponent=st.integers(-60, 60))
def test_polar_factor_symmetries(seed: int, shape: tuple[int, int], exponent: int) -> None:
    """uf(MO) = uf(M) O, uf(cM) = uf(M) for c > 0, uf(uf(M)) = uf(M); errors grow with the condition of M."""
    torch.manual_seed(seed)
    n, r = shape
    M = torch.randn(n, r, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    Q = stiefel.polar_factor(M)
    tolerance = roundoff(n, r) * float(torch.linalg.cond(M))
    assert torch.linalg.norm(stiefel.polar_factor(M @ rotation) - Q @ rotation) < tolerance
    assert torch.linalg.norm(stiefel.polar_factor(M * 2.0**exponent) - Q) < tolerance
    assert torch.linalg.norm(stiefel.polar_factor(Q) - Q) < roundoff(n, r)


def test_polar_factor_of_rank_deficient_input_is_orthonormal() -> None:
    M = torch.randn(12, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    for matrix in (M, torch.zeros_like(M)):
        assert float(stiefel.orthonormality_error(stiefel.polar_factor(matrix))) < roundoff(12, 5)


@few
@given(seed=seeds, shape=shapes)
def test_projection_is_onto_the_tangent_space(seed: int, shape: tuple[int, int]) -> None:
    """It keeps tangent vectors, gives tangent vectors (YᵀΔ skew), and what it takes away is orthogonal to them all."""
    torch.manual_seed(seed)
    Y = orthonormal(*shape)
    delta, other = torch.randn(shape, dtype=torch.float64), tangent(Y)
    size = float(torch.linalg.norm(delta))
    projected = stiefel.tangent_projection(Y, delta)
    assert torch.linalg.norm(stiefel.tangent_projection(Y, other) - other) < roundoff(*shape)
    assert torch.linalg.norm(stiefel.symm(Y.mT @ projected)) < roundoff(*shape) * size
    assert abs(float(((delta - projected) * other).sum())) < roundoff(*shape) * size


@few
@given(seed=seeds, shape=shapes)
def test_riemannian_gradient_represents_the_derivative(seed: int, shape: tuple[int, int]) -> None:
    """Canonical metric: tr(Δᵀ (I − YYᵀ/2) grad) = tr(Δᵀ ∇) for every tangent Δ, and grad is itself tangent."""
    torch.manual_seed(seed)
    Y = orthonormal(*shape)
    gradient, delta = torch.randn(shape, dtype=torch.float64), tangent(Y)
    size = float(torch.linalg.norm(gradient))
    riemannian = stiefel.riemannian_gradient(Y, gradient)
    inner = (delta * riemannian).sum() - ((Y.mT @ delta) * (Y.mT @ riemannian)).sum() / 2
    assert float(inner) == pytest.approx(float((delta * gradient).sum()), abs=roundoff(*shape) * size)
    assert torch.linalg.norm(stiefel.symm(Y.mT @ riemannian)) < roundoff(*shape) * size
    dense = gradient - Y @ gradient.mT @ Y
    assert torch.linalg.norm(riemannian - dense) < roundoff(*shape) * size


def test_project_retract_is_its_three_steps() -> None:
    Y = orthonormal(15, 4)
    moved = Y + torch.randn_like(Y)
    delta = (moved - Y) / 1.5
    delta = delta - Y @ (Y.mT @ delta + delta.mT @ Y) / 2
    expected = stiefel.polar_factor(Y + delta)
    assert torch.linalg.norm(stiefel.project_retract(Y, moved, 1.5) - expected) < roundoff(15, 4, 8.0)


def test_gradient_scaling_divisor() -> None:
    assert stiefel.gradient_scaling_divisor(1024, 256) == 2.0
    assert stiefel.gradient_scaling_divisor(1024, None) == 1.0
    for size in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="hidden_size: found"):
            stiefel.gradient_scaling_divisor(8, size)


def test_orthonormality_error_counts_all_of_it() -> None:
    Q = orthonormal(3, 10, 4)
    scale = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)  # ‖c²I − I‖ = |c² − 1| sqrt(4)
    expected = torch.tensor([0.0, 6.0, 2.0], dtype=torch.float64)
    assert torch.allclose(stiefel.orthonormality_error(scale[:, None, None] * Q), expected, atol=roundoff(10, 4))


def test_unknown_retraction_is_refused() -> None:
    Y = orthonormal(5, 2)
    with pytest.raises(ValueError, match="retraction: found 'svd', wanted one of 'polar'"):
        stiefel.project_retract(Y, Y, 1.0, "svd")


@pytest.mark.parametrize("name", RETRACTIONS)
def test_float32_keeps_float32_accuracy(name: str) -> None:
    Y = orthonormal(64, 8)
    moved = Y + 0.05 * torch.randn_like(Y)
    exact = stiefel.project_retract(Y, moved, 1.3, name)
    single = stiefel.project_retract(Y.float(), moved.float(), 1.3, name)
    assert single.dtype == torch.float32
    ratio = torch.finfo(torch.float32).eps / EPS
    assert torch.linalg.norm(single.double() - exact) < ratio * roundoff(64, 8)

"""sk.polar: values, gradients, tracing and errors of the public function (the kernels have their own tests)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import stella_kernels as sk
from tests.random_matrices import orthonormal

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7, 3), (5, 5), (9, 1), (1, 1), (2, 11, 4), (2, 3, 6, 2)]


def conditioned(shape: tuple[int, ...], condition: float = 3.0) -> Tensor:
    """Random float64 with singular values between 1 and ``condition``."""
    *batch, n, r = shape
    left, right = orthonormal(*batch, n, r), orthonormal(*batch, r, r)
    values = 1 + (condition - 1) * torch.rand(*batch, r, dtype=torch.float64)
    return left * values.unsqueeze(-2) @ right.mT


def exact(M: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(M.double(), full_matrices=False)
    return left @ right


@pytest.mark.parametrize("method", ["auto", "newton_schulz", "svd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> None:
    M = conditioned(shape).to(dtype)
    before = M.clone()
    Q, info = sk.polar(M, method, return_info=True)
    assert Q.shape == M.shape
    assert Q.dtype == dtype
    matrices = math.prod(shape[:-2])
    assert info.shape == (matrices, 5)
    assert info.dtype == torch.float64
    assert bool((info[:, 0] == 0).all())
    # the factor moves by at most 2 / (σ_min + σ_next) <= 1 times what M is perturbed by; an SVD perturbs it by about
    # n eps σ_max in its arithmetic, and the store rounds by eps / 2
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    n, r = shape[-2:]
    bound = 3 * n * math.sqrt(r) * torch.finfo(arithmetic).eps + math.sqrt(r) * torch.finfo(dtype).eps / 2
    assert bool(((Q.double() - exact(M)).flatten(-2).norm(dim=-1) <= bound).all())
    assert torch.equal(M, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    M = conditioned(shape).requires_grad_()
    assert torch.autograd.gradcheck(sk.polar, (M,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_lower_precision(dtype: torch.dtype) -> None:
    M = conditioned((3, 12, 4)).to(dtype).requires_grad_()
    G = torch.randn(3, 12, 4).to(dtype)
    (found,) = torch.autograd.grad(sk.polar(M), M, G)
    wide = M.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(sk.polar(wide), wide, G.double())
    assert found.dtype == dtype
    # Q, H and K carry n eps of float32 (Q, stored, also eps/2 of dtype) and enter with 1 / h <= 1: Q in K, QK and the
    # outer product, so four times; the result is rounded once more
    bound = 4 * 12 * torch.finfo(torch.float32).eps * 3 + 5 * torch.finfo(dtype).eps / 2
    assert (found.double() - wanted).norm() <= bound * G.double().norm()


def test_gradient_does_not_need_a_contiguous_input() -> None:
    stored = conditioned((10, 3)).mT.contiguous().requires_grad_()  # (r, n)
    assert torch.autograd.gradcheck(lambda t: sk.polar(t.mT), (stored,))


def test_rank_deficient_has_a_factor_and_a_nan_gradient() -> None:
    M = conditioned((2, 8, 3))
    M[1, :, 2] = M[1, :, 1]
    M.requires_grad_()
    Q = sk.polar(M)
    eye = torch.eye(3, dtype=torch.float64)
    # orthonormal to round-off: n eps for each of r columns
    assert bool(((Q.mT @ Q - eye).flatten(-2).norm(dim=-1) <= 8 * 3 * torch.finfo(torch.float64).eps).all())
    Q.sum().backward()
    assert M.grad is not None
    assert bool(M.grad[0].isfinite().all())
    assert bool(M.grad[1].isnan().all())


@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 5, 2), (4, 3, 0), (0, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    M = torch.empty(shape, requires_grad=True)
    Q, info = sk.polar(M, return_info=True)
    assert Q.shape == shape
    assert info.shape == (math.prod(shape[:-2]), 5)
    Q.sum().backward()
    assert M.grad is not None
    assert M.grad.shape == shape


def test_info_needs_no_gradient() -> None:
    Q, info = sk.polar(torch.randn(5, 2, requires_grad=True), return_info=True)
    assert Q.requires_grad
    assert not info.requires_grad


def test_opcheck() -> None:
    for M in (torch.randn(2, 6, 3), torch.randn(6, 3, requires_grad=True)):
        torch.library.opcheck(torch.ops.stella_kernels.polar.default, (M, "auto"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    M = conditioned((2, 9, 3)).requires_grad_()
    G = torch.randn(2, 9, 3, dtype=torch.float64)
    run = torch.compile(lambda t: sk.polar(t, return_info=True), fullgraph=True, backend=backend)
    (Q, info), (wanted_Q, wanted_info) = run(M), sk.polar(M, return_info=True)
    assert torch.equal(Q, wanted_Q)  # the same operator on the same numbers
    assert torch.equal(info[:, [0, 2, 3]], wanted_info[:, [0, 2, 3]])
    (found,), (wanted,) = torch.autograd.grad(Q, M, G), torch.autograd.grad(wanted_Q, M, G)
    # the backward is a dozen r- and n-sized products that the compiler may fuse: each n eps
    assert (found - wanted).norm() <= 12 * 9 * torch.finfo(torch.float64).eps * wanted.norm()


def test_second_derivative_is_an_error() -> None:
    M = conditioned((6, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(sk.polar(M).sum(), M, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (gradient.sum() + M.sum()).backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_names_the_matrix(bad: float) -> None:
    M = torch.randn(4, 6, 2)
    M[2, 3, 1] = bad
    with pytest.raises(RuntimeError, match="2"):
        sk.polar(M)


@pytest.mark.parametrize(
    ("M", "method", "error", "message"),
    [
        (torch.zeros(3, 5), "auto", ValueError, r"M: found shape \(3, 5\).*\.mT"),
        (torch.zeros(5), "auto", ValueError, "at least two dimensions"),
        (torch.zeros(5, 3, dtype=torch.int64), "auto", TypeError, "M: found dtype torch.int64"),
        (torch.zeros(5, 3, dtype=torch.complex64), "auto", TypeError, "complex64, .*complex factors are not supported"),
        ([[1.0]], "auto", TypeError, "M: found list"),
        (torch.eye(3).to_sparse(), "auto", TypeError, r"M: found layout torch\.sparse_coo"),
        (torch.zeros(5, 3), "qr", ValueError, "method: found 'qr'"),
    ],
)
def test_bad_input(M: object, method: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.polar(M, method)  # type: ignore[arg-type]


def test_info_is_on_the_cpu_whatever_the_default_device() -> None:
    empty, full = torch.zeros(0, 5, 3), torch.randn(2, 5, 3)
    with torch.device("meta"):
        assert sk.polar(empty, return_info=True)[1].device.type == "cpu"
        assert sk.polar(full, return_info=True)[1].device.type == "cpu"

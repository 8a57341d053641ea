"""The polar factor's derivative: as exact as the data allow, whatever the scale, autocast and way of asking."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import stella_kernels as sk
from tests.random_matrices import orthonormal

F64_EPS = torch.finfo(torch.float64).eps


def spread(n: int, r: int, condition: float) -> Tensor:
    """Random float64 with singular values from 1 down to 1 / condition."""
    values = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    return orthonormal(n, r) * values @ orthonormal(r, r).mT


def gradient(M: Tensor, G: Tensor) -> Tensor:
    leaf = M.clone().requires_grad_()
    (found,) = torch.autograd.grad(sk.polar(leaf), leaf, G)
    return found


def exact(M: Tensor, G: Tensor) -> Tensor:
    """P [(K − Kᵀ)ᵢⱼ / (σᵢ + σⱼ)] Rᵀ + (I − P Pᵀ) Ḡ R Σ⁻¹ Rᵀ with K = PᵀḠR, from the SVD M = P Σ Rᵀ in float64."""
    P, sigma, Rt = torch.linalg.svd(M.double(), full_matrices=False)
    turned = G.double() @ Rt.mT  # (n, r)
    K = P.mT @ turned  # (r, r)
    within = P @ ((K - K.mT) / (sigma.unsqueeze(-1) + sigma))
    return (within + (turned - P @ K) / sigma) @ Rt


@pytest.mark.parametrize(
    ("dtype", "condition"),
    [
        *((torch.float32, condition) for condition in (1e1, 1e3, 1e5, 1e6)),
        *((torch.float64, condition) for condition in (1e3, 1e9, 1e11)),
        (torch.bfloat16, 1e1),
        (torch.float16, 1e2),
    ],
)
@pytest.mark.parametrize(("n", "r"), [(40, 4), (14336, 8)])
def test_right_while_the_matrix_has_full_rank(n: int, r: int, dtype: torch.dtype, condition: float) -> None:
    M = spread(n, r, condition).to(dtype)
    G = torch.randn(n, r).to(dtype)
    found, wanted = gradient(M, G), exact(M, G)
    smallest = float(torch.linalg.svdvals(M.double())[-1])
    condition = 1 / smallest  # after rounding to dtype
    assert found.dtype == dtype
    # h is off by (sqrt(n) + 4 r) eps of the largest in float64, squared below it; the gradient has 1/h, twice where Q
    # is M H⁻¹, and the SVD that it is compared with is off by some r eps κ. In float64, Q comes with an error of eps κ
    # of the kernel's, which turns the space that Ḡ is projected to
    sums = (math.sqrt(n) + 4 * r) * F64_EPS
    relative = 4 * sums * condition if dtype == torch.float64 else 2 * sums * condition**2 + 8 * r * F64_EPS * condition
    bound = (relative + torch.finfo(dtype).eps / 2) * float(G.double().norm()) / smallest
    assert float((found.double() - wanted).norm()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [5, 3000])
def test_nan_where_the_rank_is_deficient(n: int, dtype: torch.dtype) -> None:
    M, G = torch.randn(4, n, 3).to(dtype), torch.randn(4, n, 3).to(dtype)
    M[1, :, 2] = M[1, :, 0]
    M[2] = 0
    M[3, :, 1] = 2 * M[3, :, 2]
    found = gradient(M, G)
    assert found[0].isfinite().all()
    assert found[1:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float32, (-110, 110)),
        (torch.float64, (-1000, -500, 500, 1000)),
        (torch.bfloat16, (-110, 110)),
        (torch.float16, (-10, 6)),
    ],
)
def test_scale_of_the_matrix_divides_the_gradient(dtype: torch.dtype, exponents: tuple[int, ...]) -> None:
    """By a power of two, which nothing rounds: beyond it gradients are subnormal."""
    M, G = spread(33, 4, 3.0).to(dtype), torch.randn(33, 4).to(dtype) / 64
    M[:, 1] *= 0.5  # not all alike
    wanted = gradient(M, G).double()
    for exponent in exponents:
        found = gradient(M * 2.0**exponent, G).double() * 2.0**exponent
        # the root of the scale may round once in float64, the kernel's Q by some eps κ in its own arithmetic
        arithmetic = F64_EPS if dtype == torch.float64 else 0.0
        bound = (64 * 6 * arithmetic + 64 * F64_EPS + torch.finfo(dtype).eps) * float(wanted.norm())
        assert float((found - wanted).norm()) <= bound


def test_many_rows_are_summed() -> None:
    """Of one column, (Ḡ − q qᵀḠ) / ‖m‖; a float32 sum of four million terms one by one loses some percent."""
    m = 1 + torch.rand(1 << 22, 1)
    G = 1 + torch.rand(1 << 22, 1)
    found = gradient(m, G).double()
    norm = m.double().norm()
    q = m.double() / norm
    wanted = (G.double() - q * (q * G.double()).sum()) / norm
    # what is left of Ḡ is a third of it, and only the result is rounded: 1e-12 allows for the sums in float64
    assert float((found - wanted).norm()) <= (torch.finfo(torch.float32).eps + 1e-12) * float(wanted.norm())


def test_a_float32_matrix_is_not_widened_at_once() -> None:
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64:
                largest = max(largest, out.numel())
            return out

    M, G = torch.randn(1 << 18, 16, requires_grad=True), torch.randn(1 << 18, 16)
    Q = sk.polar(M)
    with Sizes():
        torch.autograd.grad(Q, M, G)
    assert 0 < largest <= 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(dtype: torch.dtype, autocast: torch.dtype) -> None:
    M, G = torch.randn(300, 6).to(dtype), torch.randn(300, 6).to(dtype)
    Q, wanted = sk.polar(M), gradient(M, G)
    with torch.autocast("cpu", dtype=autocast):
        assert torch.equal(sk.polar(M), Q)
        assert torch.equal(gradient(M, G), wanted)


# ---- ways of asking --------------------------------------------------------------------------------------------------


def cubes(M: Tensor) -> Tensor:
    return sk.polar(M).pow(3).sum()


def by_autograd(M: Tensor) -> Tensor:
    leaf = M.clone().requires_grad_()
    return torch.autograd.grad(cubes(leaf), leaf)[0]


def close(found: Tensor, wanted: Tensor) -> bool:
    """The same sums of some ten terms in float64, in another order."""
    return found.shape == wanted.shape and float((found - wanted).norm()) <= 64 * F64_EPS * float(wanted.norm() + 1)


@pytest.mark.parametrize("shape", [(7, 3), (4, 4), (2, 6, 3)])
def test_gradcheck_in_both_modes_and_in_batches(shape: tuple[int, ...]) -> None:
    M = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ways = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(sk.polar, (M,), **ways)


def test_transforms_of_functions() -> None:
    M, batch = torch.randn(9, 4, dtype=torch.float64), torch.randn(5, 9, 4, dtype=torch.float64)
    G = torch.randn(9, 4, dtype=torch.float64)
    assert close(torch.func.grad(cubes)(M), by_autograd(M))
    Q, pull = torch.func.vjp(sk.polar, M)
    assert torch.equal(Q, sk.polar(M))
    assert close(pull(G)[0], gradient(M, G))
    jacobian = torch.func.jacrev(sk.polar)(M)  # (9, 4, 9, 4)
    assert close(torch.func.jacfwd(sk.polar)(M), jacobian)
    assert close(torch.func.jvp(sk.polar, (M,), (G,))[1], torch.einsum("abcd,cd->ab", jacobian, G))
    assert close(torch.einsum("abcd,ab->cd", jacobian, G), gradient(M, G))
    assert close(torch.func.vmap(sk.polar)(batch), sk.polar(batch))
    assert close(torch.func.vmap(torch.func.grad(cubes))(batch), torch.stack([by_autograd(M) for M in batch]))


def test_vmap_over_any_dimension_with_info() -> None:
    batch = torch.randn(5, 2, 9, 4, dtype=torch.float64)
    wanted, rows = sk.polar(batch, return_info=True)
    for at in (0, 1, 2):
        moved = batch.movedim(0, at)
        Q, info = torch.func.vmap(lambda M: sk.polar(M, return_info=True), in_dims=at)(moved)
        assert close(Q, wanted)
        assert torch.equal(info[..., 0], rows.reshape(5, 2, -1)[..., 0])


def test_forward_mode_beside_a_gradient() -> None:
    M, tangent = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        Q = sk.polar(forward_ad.make_dual(M, tangent))
        pushed = forward_ad.unpack_dual(Q).tangent
    assert pushed is not None
    # the derivative is its own adjoint
    assert close(pushed, gradient(M, tangent))


@pytest.mark.parametrize(
    "twice",
    [
        lambda M: torch.func.hessian(cubes)(M),
        lambda M: torch.func.grad(lambda N: torch.func.grad(cubes)(N).sum())(M),
        lambda M: torch.func.jacrev(torch.func.jacfwd(sk.polar))(M),
        lambda M: torch.func.jacfwd(torch.func.jacfwd(sk.polar))(M),
        lambda M: torch.func.jacfwd(torch.func.jacrev(sk.polar))(M),
    ],
    ids=["hessian", "grad of grad", "reverse of forward", "forward of forward", "forward of reverse"],
)
def test_second_derivatives_by_transforms_are_refused(twice: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="differentiable once"):
        twice(torch.randn(5, 2, dtype=torch.float64))


def adapter(opaque: bool) -> Callable[[Tensor], Tensor]:
    U, S, Vt = orthonormal(3, 2), torch.eye(2, dtype=torch.float64), orthonormal(4, 2).mT
    W = torch.randn(3, 4, dtype=torch.float64)
    if opaque:
        return lambda x: sk.stella_adapter(torch.nn.functional.linear(x, W), x, U, S, Vt, 1.0)
    return lambda x: sk.stella_linear(x, W, None, U, S, Vt, 1.0)


FUNCTIONS = {
    "polar": lambda: sk.polar,
    "stella_linear": lambda: adapter(False),
    "stella_adapter": lambda: adapter(True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_forward_mode_is_refused(name: str) -> None:
    """Also of a function that was compiled before, and not after the level is left."""
    torch._dynamo.reset()
    M = torch.randn(9, 4, dtype=torch.float64)
    f = FUNCTIONS[name]()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    wanted = f(M)
    assert close(compiled(M), wanted)
    with forward_ad.dual_level(), pytest.raises(Exception, match=f"{name}: compiled inside"):
        compiled(forward_ad.make_dual(M, torch.ones_like(M)))
    assert close(compiled(M), wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_past_a_graph_break_is_right_or_refused(name: str) -> None:
    torch._dynamo.reset()
    M, tangent = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    compiled = torch.compile(FUNCTIONS[name](), backend="aot_eager")
    with forward_ad.dual_level():
        if name == "polar":
            found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(M, tangent))).tangent
            assert found is not None
            assert close(found, gradient(M, tangent))
        else:
            with pytest.raises(NotImplementedError, match="forward mode AD"):
                compiled(forward_ad.make_dual(M, tangent))


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda M: f(M).sum())])
def test_compiled_transforms_are_refused(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(transform(sk.polar), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"polar: called under a transform.*outside torch.compile"):
        compiled(torch.randn(3, 9, 4))


@pytest.mark.parametrize("name", ["stella_linear", "stella_adapter"])
def test_backward_under_autocast_is_that_of_the_forward_pass(name: str) -> None:
    x = torch.randn(8, 4, requires_grad=True)
    weights = [torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 2), torch.randn(2, 4)]
    W, *factors = (w.requires_grad_() for w in weights)
    gradients = []
    for inside in (False, True):
        if name == "stella_linear":
            y = sk.stella_linear(x, W, None, *factors, 1.0)
        else:
            y = sk.stella_adapter(torch.nn.functional.linear(x, W), x, *factors, 1.0)
        asked = [x, *factors, *([W] if name == "stella_linear" else [])]
        if name == "stella_adapter":
            asked = factors  # x's gradient has the base layer's, which is torch's own affair
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(y, asked, torch.ones_like(y)))
    for plain, under in zip(*gradients, strict=True):
        assert torch.equal(plain, under)

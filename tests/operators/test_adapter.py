"""The adapter's kernels beyond the table of cases: threads, scratch, rows that end anywhere; adapters joined to one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from stella_kernels import StellaLinear, stella_linear
from stella_kernels.functional import join_adapters, stella_adapter
from stella_kernels.operators import backends, base_product
from stella_kernels.reference import adapter, philox
from tests.random_matrices import orthonormal

KERNELS = torch.ops.stella_kernels
SCALE = 1.25
# chunks are of at most 128 rows and blocks of at most 960 features, shorter for large ranks
SHAPES = [(1, 3, 2, 2), (127, 961, 95, 5), (129, 40, 1931, 8), (515, 257, 301, 16), (260, 970, 485, 65)]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def factors(m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    U, V = (orthonormal(k, r, dtype=dtype) for k in (m, n))
    return U, (torch.randn(r, r, dtype=torch.float64) / math.sqrt(r)).to(dtype), V.mT.contiguous()


def poison(T: int, m: int, n: int, r: int) -> None:
    """Leave the kernels' own scratch full of NaN."""
    x, y = torch.full((T, n), math.nan), torch.full((T, m), math.nan)
    U, S, Vt = (torch.full(shape, math.nan) for shape in ((m, r), (r, r), (r, n)))
    A = KERNELS.adapter_forward_(y, x, U, S, Vt, 1.0, 0.5, torch.tensor(1))
    KERNELS.adapter_backward_(x.clone(), 0.0, y, x, A, U, S, Vt, 1.0, 0.5, torch.tensor(1), [True] * 3)


def test_native_kernels_serve_where_they_were_built() -> None:
    if not backends.backends()[0].available:
        pytest.skip("the native library does not serve here")
    for operator in ("philox_dropout", "adapter_forward_", "adapter_product", "adapter_backward_"):
        assert backends.serving(operator) == "cpu"


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads(shape: tuple[int, int, int, int], p: float, threads: int) -> None:
    T, m, n, r = shape
    poison(*shape)
    x, y, grad_y, bias = torch.randn(T, n), torch.randn(T, m), torch.randn(T, m), torch.randn(m)
    U, S, Vt = factors(m, n, r)
    seed = torch.randint(-(2**63), 2**63 - 1, ()) if p else None
    wide = [t.double() for t in (U, S, Vt)]
    term, exact_A = adapter.adapter_forward(x.double(), *wide, SCALE, p, seed)
    wanted = adapter.adapter_backward(grad_y.double(), x.double(), *wide, SCALE, p, seed)
    added = y.clone()
    A = KERNELS.adapter_forward_(added, x, U, S, Vt, SCALE, p, seed)
    product, same_A = KERNELS.adapter_product(x, bias, U, S, Vt, SCALE, p, seed)
    grad_x = torch.full((T, n), math.nan)
    grads = KERNELS.adapter_backward_(grad_x, 0.0, grad_y, x, A, U, S, Vt, SCALE, p, seed, [True] * 3)
    # three products of sums of at most max(T, m, n) terms whose errors add as random signs do, each at most a few
    # round-offs of the norms of what is multiplied
    bound = 8 * torch.finfo(torch.float32).eps * math.sqrt(max(T, m, n))
    Q = SCALE * grad_y.double() @ wide[0]
    sizes = {"S": float(Q.norm() * exact_A.norm())}
    found = {"A": (A, exact_A), "y": (added, y.double() + term), "product": (product, bias.double() + term)}
    found |= {name: (value, getattr(wanted, name)) for name, value in zip(("U", "S", "Vt"), grads, strict=True)}
    found["x"] = (grad_x, wanted.x)
    for name, (value, exact) in found.items():
        error = float((value.double() - exact).norm())
        assert error <= bound * sizes.get(name, float(exact.norm())), (name, error)
    assert torch.equal(A, same_A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1027), (2, 3, 5), (1, 5000), (4099, 3)])
def test_dropout_is_bitwise_the_reference(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    x, seed = torch.randn(shape).to(dtype), torch.randint(-(2**63), 2**63 - 1, ())
    for p in (0.0, 0.05, 0.5, 1 - 2.0**-20, 1.0):
        assert torch.equal(KERNELS.philox_dropout(x, p, seed), philox.dropout(x, p, seed))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_run_repeats_bitwise(p: float) -> None:
    T, m, n, r = 700, 130, 97, 9
    x, grad_y, (U, S, Vt) = torch.randn(T, n), torch.randn(T, m), factors(m, n, r)
    seed = torch.tensor(9) if p else None

    def run() -> tuple[Tensor, ...]:
        y, A = KERNELS.adapter_product(x, None, U, S, Vt, SCALE, p, seed)
        grad_x = torch.empty(T, n)
        grads = KERNELS.adapter_backward_(grad_x, 0.0, grad_y, x, A, U, S, Vt, SCALE, p, seed, [True] * 3)
        return y, A, grad_x, *grads

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_projection_is_bitwise_the_kept_one(p: float, opaque: bool, dtype: torch.dtype) -> None:
    m, n, r = 23, 150, 5
    W, values = torch.randn(m, n).to(dtype), factors(m, n, r)
    x, grad_y = torch.randn(3, 40, n).to(dtype), torch.randn(3, 40, m).to(dtype)
    results, kept = [], []
    for recompute in (False, True):
        inputs = [t.clone().requires_grad_() for t in (x, *values)]
        saved: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            if opaque:
                y = stella_adapter(nn.functional.linear(inputs[0], W), *inputs, SCALE, p, recompute=recompute)
            else:
                y = stella_linear(inputs[0], W, None, *inputs[1:], SCALE, p, recompute=recompute)
        results.append((y, *torch.autograd.grad(y, inputs, grad_y)))
        kept.append(3 * 40 * r in saved)
    assert kept == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("diagonal", [(False, False), (True, False), (True, True)])
def test_joined_adapters_are_their_sum(diagonal: tuple[bool, bool]) -> None:
    m, n = 31, 45
    adapters = []
    for r, scale, diag in zip((3, 8), (0.7, 1.0), diagonal, strict=True):
        U, S, Vt = factors(m, n, r, torch.float64)
        core = S.diagonal().clone() if diag else S
        adapters.append((U.requires_grad_(), core.requires_grad_(), Vt.requires_grad_(), scale))
    x, grad_y = torch.randn(20, n, dtype=torch.float64), torch.randn(20, m, dtype=torch.float64)
    U, S, Vt, scale = join_adapters(adapters)
    assert S.dim() == (1 if all(diagonal) else 2)
    together = stella_adapter(torch.zeros(20, m, dtype=torch.float64), x, U, S, Vt, scale)
    apart = torch.zeros(20, m, dtype=torch.float64)
    for own in adapters:
        apart = stella_adapter(apart, x, *own)
    leaves = [t for own in adapters for t in own[:3]]
    found = (together, *torch.autograd.grad(together, leaves, grad_y))
    wanted = (apart, *torch.autograd.grad(apart, leaves, grad_y))
    for a, b in zip(found, wanted, strict=True):
        # sums of at most 56 terms in another order: 1e-13 is 450 round-offs
        assert float((a - b).detach().norm()) <= 1e-13 * float(b.detach().norm())


def test_joining_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="adapters: found none"):
        join_adapters([])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_nothing_leaves_the_base_as_it_is(bias: bool, dtype: torch.dtype) -> None:
    """The base's product accumulates into the adapter's, which is the bias then: no other rounding than F.linear's."""
    base = nn.Linear(96, 40, bias=bias, dtype=dtype)
    layer = StellaLinear(base, r=4, init="zero")
    x = torch.randn(70, 96).to(dtype)
    with torch.no_grad():
        difference = (layer(x) - base(x)).double().norm()
    # the library may order its sums differently where it accumulates: 96 terms in float32, one rounding to storage
    bound = 96 * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0)
    assert difference <= bound * base(x).double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("library", [False, True])
def test_base_product_in_half_precision(
    dtype: torch.dtype, transposed: bool, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and what is left over of them, whichever way this machine would take."""
    monkeypatch.setattr(base_product, "library_computes_in", lambda dtype: library)
    monkeypatch.setattr(base_product, "_BLOCK", 50)
    T, k, n = 120, 90, 70
    left, out = torch.randn(T, k).to(dtype), torch.randn(T, n).to(dtype)
    right = (torch.randn(n, k).mT if transposed else torch.randn(k, n)).to(dtype)
    exact = out.double() + left.double() @ right.double()
    base_product.accumulate_product(out, left, right)
    # one rounding to storage, two where the library rounds the product first; sums of 91 terms in float32
    bound = 2 * torch.finfo(dtype).eps / 2 + 91 * torch.finfo(torch.float32).eps
    assert float((out.double() - exact).norm()) <= bound * float(exact.norm())

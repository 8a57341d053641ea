"""Results that the CPU kernels write past the cache are, bit for bit, those that they leave in it.

Each large call is made again in pieces below the size at which that begins (kStreamedBytes in csrc/cpu/bindings.h).
"""

from __future__ import annotations

import pytest
import torch

from stella_kernels.functional import polar
from stella_kernels.operators import backends

pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # more would share the rows of a piece's few matrices: other sums
    pytest.mark.skipif(not backends.backends()[0].available, reason="the native library does not serve here"),
]
KERNELS = torch.ops.stella_kernels
STREAMED = 16 * 2**20


# heights after which a matrix begins in the middle of a vector, and whole ones
@pytest.mark.parametrize(
    ("batch", "n", "r"),
    [(32, 4096, 32), (33, 4099, 32), (131, 8192, 4), (131, 8195, 4), (65, 8192, 8), (65, 8193, 8), (40, 4099, 28)],
)
def test_polar(batch: int, n: int, r: int) -> None:
    M = torch.eye(n, r) + torch.randn(batch, n, r) * (0.1 / n**0.5)
    assert M.nbytes >= STREAMED
    torch.full_like(M, torch.nan)  # freed: what the result is made of
    pieces = [polar(piece) for piece in M.split(8)]
    assert pieces[0].nbytes < STREAMED
    assert torch.equal(polar(M), torch.cat(pieces))


@pytest.mark.parametrize(("rows", "m", "n", "r"), [(4224, 1024, 1000, 8), (4224, 1001, 1030, 5)])
def test_adapter(rows: int, m: int, n: int, r: int) -> None:
    x, grad_y = torch.randn(rows, n), torch.randn(rows, m)
    bias, U, S, Vt = torch.randn(m), torch.randn(m, r), torch.randn(r, r), torch.randn(r, n)
    assert min(x.nbytes, grad_y.nbytes) >= STREAMED

    def both(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        part, gradient = x[first:last], grad_y[first:last]
        y, A = KERNELS.adapter_product(part, bias, U, S, Vt, 1.5, 0.0, None)
        grad_x = torch.full_like(part, torch.nan)
        KERNELS.adapter_backward_(grad_x, 0.0, gradient, part, A, U, S, Vt, 1.5, 0.0, None, [True] * 3)
        return y, grad_x

    pieces = [both(first, first + rows // 3) for first in range(0, rows, rows // 3)]  # whole chunks of 128 rows
    for whole, piece in zip(both(0, rows), zip(*pieces, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(piece))

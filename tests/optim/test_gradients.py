"""The check of one factor's gradient before a step: named by the factor, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stella_kernels.optim.targets import check_gradient


def with_gradient(gradient: Tensor | None) -> nn.Parameter:
    p = nn.Parameter(torch.eye(6, 3))
    p.grad = gradient
    return p


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones(6, 3),
        torch.ones(3, 6).mT,
        torch.ones(12, 6)[::2, ::2],
        torch.ones(6, 3)[:, torch.tensor([0, 1, 2])],
    ],
)
def test_one_that_can_be_rewritten_is_returned(gradient: Tensor) -> None:
    p = with_gradient(gradient)
    assert check_gradient("layer.U", p) is p.grad


@pytest.mark.parametrize(
    ("gradient", "found"),
    [
        (torch.ones(6, 3).to_sparse(), "of layout torch.sparse_coo, wanted a dense one"),
        (torch.ones(1, 3).expand(6, 3), r"of strides \(0, 1\), whose elements share memory"),
        (torch.ones(8).as_strided((6, 3), (1, 1)), r"of strides \(1, 1\), whose elements share memory"),
        (torch._neg_view(torch.ones(6, 3)), r"that is a negated view, .*resolve_neg\(\)"),
    ],
)
def test_one_that_cannot_is_named(gradient: Tensor, found: str) -> None:
    p = with_gradient(gradient)
    before = gradient.clone()
    with pytest.raises(RuntimeError, match=f"layer.U: found a gradient {found}"):
        check_gradient("layer.U", p)
    assert p.grad is gradient
    assert torch.equal(p.grad.to_dense(), before.to_dense())


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda p: p.grad.double(), "of torch.float64 on cpu, wanted torch.float32 on cpu"),
        (lambda p: p.grad.to("meta"), "of torch.float32 on meta, wanted torch.float32 on cpu"),
        (lambda p: p.grad[:4], r"of shape \(4, 3\), wanted \(6, 3\)"),
        (lambda p: p.grad.to(torch.complex64).conj(), "of torch.complex64 on cpu, wanted torch.float32"),
    ],
)
def test_one_that_torch_would_not_assign(make, found: str) -> None:
    """Reached by replacing ``.data``, by ``grad_dtype`` or by a wrapper."""

    class Holder:
        dtype, device, shape = torch.float32, torch.device("cpu"), torch.Size((6, 3))

        def __init__(self) -> None:
            self.grad = torch.ones(6, 3)

    holder = Holder()
    holder.grad = make(holder)
    with pytest.raises(RuntimeError, match=f"layer.Vt: found a gradient {found}"):
        check_gradient("layer.Vt", holder)  # type: ignore[arg-type]


def test_none_at_all() -> None:
    with pytest.raises(RuntimeError, match=r"layer\.U: found no gradient"):
        check_gradient("layer.U", with_gradient(None))

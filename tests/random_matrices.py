"""Random matrices of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random point of St(n, r), or a batch of them, by a QR that none of the code under test makes."""
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64)).Q.to(dtype)

"""Distances from the manifold of many factors at once, against float64."""

from __future__ import annotations

import math

import torch
from torch import nn

from stella_kernels.distributed.measures import distances
from stella_kernels.nn import StiefelFactor


def test_distances_of_mixed_factors_in_one_go() -> None:
    # Two roundings of YᵀY, each an r x r matrix of sums of n products of |y| <= 1/sqrt(n) or so: w sqrt(n r) at most.
    torch.manual_seed(0)
    factors, wanted, tolerances = [], [], []
    for n, r, dtype, transposed in [
        (37, 5, torch.float32, False),
        (64, 5, torch.float32, True),
        (40, 8, torch.float64, False),
        (33, 1, torch.float32, True),
        (96, 16, torch.bfloat16, False),
        (48, 16, torch.float32, False),
    ]:
        Y = (torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q + 0.01 * torch.randn(n, r)).to(dtype)
        parameter = nn.Parameter(Y.mT.contiguous() if transposed else Y)
        factors.append(StiefelFactor(parameter, transposed, f"{n}x{r}"))
        wanted.append(float(torch.linalg.matrix_norm(Y.double().mT @ Y.double() - torch.eye(r))))
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        tolerances.append(2 * torch.finfo(arithmetic).eps * (n * r) ** 0.5)
    for found, value, tolerance in zip(distances(factors), wanted, tolerances, strict=True):
        assert abs(found - value) <= tolerance
    with torch.no_grad():
        factors[1].parameter[2, 3] = float("nan")
        factors[2].parameter.fill_(1e300)
    found = distances(factors)
    assert [math.isfinite(each) for each in found] == [True, False, False, True, True, True]

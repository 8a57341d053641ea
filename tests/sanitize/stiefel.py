"""Calls of the operators over Stiefel factors: any shapes, memory and values, and what has to be true afterwards.

Tolerances are those of ``verification/judge.py``, with its safety of 32 for every dtype: the strict judgement is the
table of cases.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from stella_kernels.reference import adamw, stiefel
from tests.sanitize.case import Call, Complaints, away, not_orthonormal, round_offs, wrong_info
from tests.sanitize.layouts import DTYPES, KINDS, MOST_RANKS, Held, hold, sizes_around, values

_SAFETY = 32.0
_ALIKE = ("constant", "repeated")  # kinds of values with many equal ones
_METHODS = ("auto", "auto", "auto", "svd", "newton_schulz")
_WORK = 250_000  # n r², of most matrices; some have ten times as much


def _shape(random: Random) -> tuple[int, int]:
    if random.random() < 0.04:
        return random.choice((0, 1, 5, 300)), 0
    r = sizes_around(random, random.choice(MOST_RANKS))
    most = max(r, min(12_000, int(_WORK * random.choice((1,) * 11 + (10,)) / (r * (r + 8)))))
    n = most if random.random() < 0.05 else max(r, sizes_around(random, most))
    return (r, r) if random.random() < 0.05 else (n, r)


def _orthonormal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q


def _point(random: Random, shape: tuple[int, int], dtype: torch.dtype, kind: str, generator: torch.Generator) -> Tensor:
    """A factor: orthonormal, but where ``kind`` is another and chance has it."""
    if kind != "gaussian" and random.random() < 0.3:
        return values(random, shape, dtype, kind, generator)
    return _orthonormal(shape, generator)


def _law(dtype: torch.dtype, n: int, r: int, alike: bool) -> float:
    """Of orthonormality. Sums over the rows are in float64; those of n equal terms have round-offs of equal sign."""
    u, w = round_offs(dtype)
    return 2 * u + _SAFETY * w * math.sqrt(r) + (n if alike else math.sqrt(n)) * round_offs(torch.float64)[1]


def _finite(held: Held) -> bool:
    return bool(held.view.isfinite().all())


def _before(held: Held) -> Tensor:
    return held.before.as_strided(held.view.shape, held.view.stride(), held.view.storage_offset())


def polar(random: Random, generator: torch.Generator) -> Call:
    dtype, kind, method = random.choice(DTYPES), random.choice(KINDS), random.choice(_METHODS)
    lead = random.choice(((), (), (), (1,), (2,), (5,), (2, 3), (0,), (1, 2, 1)))
    n, r = _shape(random)
    M = hold(random, values(random, (*lead, n, r), dtype, kind, generator).to(dtype))

    def judge(results: tuple[Tensor, Tensor]) -> Complaints:
        Q, info = results
        if Q.shape != M.view.shape or Q.dtype != dtype:
            return [f"Q: {tuple(Q.shape)} {Q.dtype}"]
        found = wrong_info(info, math.prod(lead))
        if found or not Q.numel():
            return found
        u, w = round_offs(dtype)
        alike = kind in _ALIKE or 0 in M.view.stride()
        for value, factor in zip(M.view.reshape(-1, n, r), Q.reshape(-1, n, r), strict=True):
            found += not_orthonormal("Q", factor, _law(dtype, n, r, alike))
            scaled = value.double() / value.double().abs().max().clamp_min(1e-300)
            left, singular, right = torch.linalg.svd(scaled, full_matrices=False)
            condition = float(singular[0] / singular[-1].clamp_min(1e-300))
            if condition * w < 1e-4:
                found += away("Q", factor, left @ right, u + _SAFETY * w * math.sqrt(r) * condition)
        return found

    fault = "" if _finite(M) else "a value that is not finite"
    return Call("polar", {"M": M, "method": method}, judge, fault=fault, kind=kind, may_raise=method == "newton_schulz")


def project_retract_(random: Random, generator: torch.Generator) -> Call:
    kind, method = random.choice(KINDS), random.choice(_METHODS)
    dtype, count = random.choice(DTYPES), random.choice((0, 1, 1, 2, 3, 5))
    moved, previous, divisors = [], [], []
    for _ in range(count):
        shape = _shape(random)
        Y = _point(random, shape, dtype, kind, generator).to(dtype)
        step = values(random, shape, dtype, kind, generator)
        if kind == "gaussian":
            step *= random.choice((0.0, 0.01, 0.5)) / math.sqrt(max(shape[0], 1))
        divisors.append(random.choice((1.0, 0.5, 2.0, 37.5)))
        moved.append(hold(random, (Y.double() + step).to(dtype), written=True))
        previous.append(hold(random, Y))

    def judge(info: Tensor) -> Complaints:
        found = wrong_info(info, count)
        for i, status in enumerate(() if found else info[:, 0].tolist()):
            finite = bool(_before(moved[i]).isfinite().all()) and _finite(previous[i])
            if status != 0.0:
                found += [] if moved[i].unchanged() else [f"moved {i}: written with status {status}"]
                found += ["status: nothing was wrong"] if kind == "gaussian" else []
                continue
            if not finite:
                found.append(f"moved {i}: not finite, and status 0")
                continue
            Q, Y = moved[i].view, previous[i].view.double()
            n, r = Q.shape
            if not Q.numel() or float((Y.mT @ Y - torch.eye(r)).abs().max()) > 0.5:  # no point to step from
                continue
            delta = (_before(moved[i]).double() - Y) / divisors[i]
            M = Y + stiefel.tangent_projection(Y, delta)
            singular = torch.linalg.svdvals(M) if bool(M.isfinite().all()) else torch.zeros(r)
            amplification = (1.0 + float(torch.linalg.vector_norm(delta))) / max(float(singular[-1]), 1e-300)
            if not math.isfinite(amplification):
                continue
            most = 16.0 if method == "auto" else max(amplification, 16.0)  # past that the path is float64's
            found += not_orthonormal(f"moved {i}", Q, most * _law(dtype, n, r, kind in _ALIKE))
            if kind == "gaussian":
                u, w = round_offs(dtype)
                tolerance = u + _SAFETY * w * math.sqrt(r) * amplification
                found += away(f"moved {i}", Q, stiefel.polar_factor(M), tolerance)
        return found

    given = {"moved": moved, "previous": previous, "divisors": divisors, "method": method}
    return Call("project_retract_", given, judge, kind=kind)


def riemannian_gradient_(random: Random, generator: torch.Generator) -> Call:
    kind = random.choice(KINDS)
    dtype, count = random.choice(DTYPES), random.choice((0, 1, 1, 2, 3, 5))
    gradients, factors, snapshots = [], [], []
    for _ in range(count):
        shape = _shape(random)
        factors.append(hold(random, _point(random, shape, dtype, kind, generator).to(dtype)))
        gradients.append(hold(random, values(random, shape, dtype, kind, generator).to(dtype), written=True))
        snapshots.append(hold(random, torch.zeros(shape, dtype=dtype), written=True))
    if random.random() < 0.4:
        snapshots = []

    def judge(info: Tensor) -> Complaints:
        found = wrong_info(info, count)
        refused = [not bool(_before(G).isfinite().all()) for G in gradients]
        for i, status in enumerate(() if found else info[:, 0].tolist()):
            G, Y = gradients[i], factors[i]
            if any(refused):
                found += [] if (status == 1.0) == refused[i] else [f"status {i}: {status}"]
                written = [each for each in (G, *snapshots[i : i + 1]) if not each.unchanged()]
                found += [f"factor {i}: written beside a gradient that is not finite"] if written else []
                continue
            if 3.0 in info[:, 0].tolist():  # of an overflow, which may stop all
                found += [] if status != 3.0 or G.unchanged() else [f"gradient {i}: written with status 3"]
                found += ["status: nothing overflows"] if kind == "gaussian" else []
                continue
            if snapshots and not torch.equal(snapshots[i].view.nan_to_num(7.0), Y.view.nan_to_num(7.0)):
                found.append(f"snapshot {i}: not the factor")
            if not _finite(Y):
                found += [] if status == 1.0 and G.unchanged() else [f"gradient {i}: of a factor that is not finite"]
            elif kind == "gaussian":
                u, w = round_offs(dtype)
                G0 = _before(G).double()
                exact = stiefel.riemannian_gradient(Y.view.double(), G0)
                tolerance = u + _SAFETY * w * math.sqrt(max(G0.shape[1], 1))
                found += away(f"gradient {i}", G.view, exact, tolerance, size=float(G0.norm()))
                found += [] if status == 0.0 else [f"status {i}: {status}"]
        return found

    given = {"gradients": gradients, "factors": factors, "snapshots": snapshots}
    return Call("riemannian_gradient_", given, judge, kind=kind)


_NAMES = ("lr", "beta1", "beta2", "eps", "step", "divisor", "sign")


def _settings(random: Random) -> dict[str, float]:
    numbers = (1.0, random.choice((0.9, 0.8)), random.choice((0.999, 0.95)), 1e-8, float(random.randint(3, 2000)))
    return dict(zip(_NAMES, (*numbers, random.choice((1.0, 0.25, 3.0)), random.choice((1.0, -1.0))), strict=True))


def stella_adamw_(random: Random, generator: torch.Generator) -> Call:
    kind = random.choice(KINDS)
    dtype, count = random.choice(DTYPES), random.choice((0, 1, 1, 2, 3, 5))
    lists: dict[str, list[Held]] = {name: [] for name in ("factors", "gradients", "exp_avgs", "exp_avg_sqs")}
    couplings, rows = [], []
    for _ in range(count):
        shape = _shape(random)
        v = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        if kind != "gaussian" and random.random() < 0.3:
            v = values(random, shape, dtype, kind, generator)
        Y = _point(random, shape, dtype, kind, generator).to(dtype)
        G = values(random, shape, dtype, kind, generator).to(dtype)
        m = 0.3 * values(random, shape, dtype, kind, generator)
        if lists["gradients"] and random.random() < 0.1 and lists["gradients"][-1].view.shape == shape:
            gradient = lists["gradients"][-1]  # read only: two factors may have one
        else:
            gradient = hold(random, G)
        for name, value in (("factors", Y), ("exp_avgs", m.to(dtype)), ("exp_avg_sqs", v.to(dtype))):
            lists[name].append(hold(random, value, written=True))
        lists["gradients"].append(gradient)
        coupling = gradient.view.double().mT @ Y.double()
        given = random.choice(("no", "float32", "float64"))
        wanted = torch.float64 if given == "float64" or dtype == torch.float64 else torch.float32
        couplings.append(hold(random, coupling.to(wanted) if given != "no" else torch.empty(0)))
        settings = _settings(random)
        if kind == "gaussian" and Y.numel():
            D = _exact(lists, couplings, -1, settings)[0]
            settings["lr"] = random.choice((0.02, 0.3)) / float(torch.linalg.vector_norm(D, dim=0).max())
        rows.append(settings)
    table = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).reshape(count, len(_NAMES))
    hyperparameters = Held(table, table.flatten(), table.flatten().clone())

    def judge(info: Tensor) -> Complaints:
        found = wrong_info(info, count)
        bad = [not _finite(G) for G in lists["gradients"]]
        for i, status in enumerate(() if found else info[:, 0].tolist()):
            Y, _, m, v = (each[i] for each in lists.values())
            if any(bad):
                right = all(each.unchanged() for each in (Y, m, v)) and (status == 1.0) == bad[i]
                found += [] if right else [f"factor {i}: written beside a gradient that is not finite, status {status}"]
            elif status != 0.0:
                found += [] if Y.unchanged() else [f"factor {i}: written with status {status}"]
                found += [f"status {i}: {status}"] if kind == "gaussian" else []
            else:
                n, r = Y.view.shape
                start = _before(Y).double()
                if n and r and float((start.mT @ start - torch.eye(r)).abs().max()) <= 0.5:
                    found += not_orthonormal(f"factor {i}", Y.view, 16 * _law(dtype, n, r, kind in _ALIKE))
                if kind == "gaussian" and Y.view.numel():
                    found += _step(lists, couplings, i, rows[i], dtype)
        return found

    given_all: dict[str, Any] = {**lists, "couplings": couplings}
    given_all |= {"hyperparameters": hyperparameters}
    return Call("stella_adamw_", given_all, judge, kind=kind)


def _exact(
    lists: dict[str, list[Held]], couplings: list[Held], i: int, settings: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    Y, G, m, v = (_before(each[i]).double() for each in lists.values())
    K = couplings[i].view
    return adamw.adamw_move(Y, G, m, v, coupling=K.double() if K.numel() else None, **settings)


def _step(
    lists: dict[str, list[Held]], couplings: list[Held], i: int, settings: dict[str, float], dtype: torch.dtype
) -> Complaints:
    """A change of g by w sqrt(r) of the gradient changes m by (1 − β₁) and v by 2 (1 − β₂) |g| of that; those change
    D = ρ m / sqrt(v) by ρ / sqrt(v) and D / (2 v); the factor changes by twice that: all here is well conditioned.
    """
    Y, G, m0, v0 = (_before(each[i]).double() for each in lists.values())
    new, _, m, v = (each[i].view for each in lists.values())
    D, exact_m, exact_v = _exact(lists, couplings, i, settings)
    u, w = round_offs(dtype)
    few, root = _SAFETY * w, math.sqrt(Y.shape[1])
    off_g = few * root * float(G.norm())
    off_m = off_g + few * float(m0.norm() + exact_m.norm())
    off_v = 2 * off_g * (1 + float(G.abs().max())) + few * float(v0.norm() + exact_v.norm())
    smallest = float(exact_v.min())
    per_m = float((D / exact_m.abs().clamp_min(1e-300)).abs().max())
    off_D = per_m * off_m + float(D.abs().max()) * off_v / (2 * smallest) + few * float(D.norm())
    found = away(f"exp_avg {i}", m, exact_m, off_m + u * float(exact_m.norm()), size=1.0)
    found += away(f"exp_avg_sq {i}", v, exact_v, off_v + u * float(exact_v.norm()), size=1.0)
    exact = stiefel.polar_factor(Y + stiefel.tangent_projection(Y, D))
    return found + away(f"factor {i}", new, exact, 2 * off_D + 2 * u * root + 4 * few * root, size=1.0)

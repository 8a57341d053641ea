"""The phases of a step on Triton's kernels in its interpreter, on rows that several processes would have.

``python -m tests.triton_kernels.phase_cases``: a line of JSON for what was compared, its error and tolerance. A process
of its own, since Triton decides when it is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from triton.runtime import interpreter

from stella_kernels.operators import phases as reference
from stella_kernels.operators import signatures
from stella_kernels.operators.status import arithmetic_dtype, grams_words, sums_words
from stella_kernels.reference import adamw, sharded, stiefel
from stella_kernels.triton_kernels import registration
from stella_kernels.triton_kernels.launch import configuration
from stella_kernels.verification.case_data import relative, round_off, safety
from tests.random_matrices import orthonormal
from tests.triton_kernels import launches as triton_launches
from tests.triton_kernels.cases import permute_programs, round_to_bfloat16

Line = tuple[str, float, float]
SETTINGS = [1e-2, 0.9, 0.99, 1e-8, 3.0, 1.5, 1.0]  # as of stella_adamw_
NAMES = ("lr", "beta1", "beta2", "eps", "step", "divisor", "sign")


@dataclass(frozen=True)
class Factor:
    """``rows[p]`` rows are process p's; stored by rows, by columns, or with gaps."""

    r: int
    rows: tuple[int, ...]
    storage: str = "rows"

    def parts(self, whole: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Each process's rows, in memory of their own."""
        return [self._stored(part.to(dtype)) for part in whole.split(self.rows)]

    def _stored(self, part: Tensor) -> Tensor:
        n, r = part.shape
        if self.storage == "columns":
            return part.mT.contiguous().mT
        if self.storage == "gaps":
            return part.new_full((2 * n, r + 1), math.nan)[::2, :r].copy_(part)
        return part.clone()


# Processes without rows, with fewer than columns, with several chunks; ranks that are and are not whole vectors.
ROWS, COLUMNS, GAPS = Factor(5, (43, 0)), Factor(16, (4, 67), "columns"), Factor(3, (1, 33), "gaps")
SLABS = (Factor(37, (63,)),)  # in float64, Gram blocks that take several programs
FUSED = (
    (torch.float32, (ROWS, COLUMNS)),
    (torch.float64, (GAPS,)),
    (torch.bfloat16, (COLUMNS, GAPS)),
    (torch.float16, (ROWS,)),
    (torch.float64, SLABS),
)
SEPARATE = (
    (torch.float32, (COLUMNS, GAPS)),
    (torch.float64, (ROWS,)),
    (torch.bfloat16, (GAPS,)),
    (torch.float16, (COLUMNS,)),
)


def small_tiles() -> None:
    """Chunks of 32 rows, tiles of 16."""
    defaults = configuration.tiles_for

    def tiles(R: int, dtype: torch.dtype) -> configuration.Tiles:
        part = min(R, 32)
        return replace(
            defaults(R, dtype), block=16, long_block=16, chunk=32, rows64=16, items=2, small=part, small64=part
        )

    configuration.tiles_for = tiles


def run(name: str, processes: Sequence[Sequence[Any]]) -> list[Any]:
    """A phase on every process."""
    return [registration.operators()[name](*given) for given in processes]


def by_process(factors: Sequence[Factor], wholes: Sequence[Tensor], dtype: torch.dtype) -> list[list[Tensor]]:
    parts = [factor.parts(whole, dtype) for factor, whole in zip(factors, wholes, strict=True)]
    return [list(each) for each in zip(*parts, strict=True)]


def joined(processes: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Of each factor all rows, in float64."""
    return [torch.cat(list(parts)).double() for parts in zip(*processes, strict=True)]


def stored(factors: Sequence[Factor], dtype: torch.dtype, make: Callable[[int, int], Tensor]) -> list[Tensor]:
    """Of each factor a matrix of all rows as the dtype holds it, in float64."""
    return [make(sum(factor.rows), factor.r).to(dtype).double() for factor in factors]


def gaussian(n: int, r: int) -> Tensor:
    return torch.randn(n, r, dtype=torch.float64)


def blocks(
    name: str, flat: Tensor, words: Callable[[int], int], pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Iterator[Line]:
    """That a buffer holds LᵀR and RᵀR (sums) or RᵀL and LᵀL (grams) of (L, R), within a product's round-off.

    A sum of n terms in any order is off by n w of the sum of their absolute values, w the arithmetic's round-off, and
    so is the product: 3 n w for products that are split into three.
    """
    _, w = round_off(dtype)
    begin = 0
    for left, right in pairs:
        r = left.shape[1]
        part = flat[begin : begin + words(r)].double()
        begin += words(r)
        full, symmetric = sharded.unpacked(part, r)
        last = right if words is sums_words else left
        for found, a, b in (
            (full, *((left, right) if words is sums_words else (right, left))),
            (symmetric, last, last),
        ):
            bound = (3 * (len(left) + 4) * w * (a.abs().mT @ b.abs())).clamp_min(1e-300)
            yield f"{name} block", float(((found - a.mT @ b).abs() / bound).max()), 1.0
        if words is sums_words:
            # each process's norm is of its rows: the sum of two is above the whole one's, by sqrt(2) at most
            norm, whole = float(part[-1]), float(torch.linalg.vector_norm(left))
            yield f"{name} norm, from below", (whole - norm) / whole, 4 * len(left) * w
            yield f"{name} norm, from above", (norm - math.sqrt(2.0) * whole) / whole, 4 * len(left) * w
    yield f"{name} length", float(begin != flat.numel()), 0.0


def same_everywhere(name: str, infos: Sequence[Tensor]) -> Iterator[Line]:
    """What processes decide by."""
    yield (
        f"{name} info differs",
        float(any(not infos[0].nan_to_num(-1.0).equal(i.nan_to_num(-1.0)) for i in infos)),
        0.0,
    )


def retracted(name: str, found: Tensor, wanted: Tensor, info: Tensor, dtype: torch.dtype) -> Iterator[Line]:
    """One factor: its value, and that its residual is bounded by what is reported, which is not wild.

    The bound on Gram matrices of condition 16 or less is csrc/cpu/stiefel/residual.h's; storing with round-off u moves
    QᵀQ by 2 u sqrt(r) and its square, and where float16 is subnormal by 2⁻²⁵ sqrt(n r) of 2²⁴ rows.
    """
    u, w = round_off(dtype)
    r = found.shape[1]
    yield f"{name} status", float(info[0]), 0.0
    yield f"{name} value", relative(found, wanted), u + safety(dtype) * w * math.sqrt(r) * 16.0
    measured = float(stiefel.orthonormality_error(found))
    yield f"{name} residual above the reported", measured - float(info[1]), 1e-13 if dtype == torch.float64 else 0.0
    least = 2.0**-12 if dtype == torch.float16 else 0.0
    moved = (u + least / 2.0) * math.sqrt(r)
    most = 2.1 * moved + moved**2 + w * math.sqrt(r) * (2 + 4 * math.sqrt(r) + 8 * 17)
    yield f"{name} reported residual", float(info[1]), most


def check_fused(dtype: torch.dtype, factors: Sequence[Factor]) -> Iterator[Line]:
    """gradient_gram, adamw_gram_, adamw_rows_."""
    u, w = round_off(dtype)
    wide = arithmetic_dtype(dtype)
    Y = stored(factors, dtype, orthonormal)
    G, m = stored(factors, dtype, gaussian), stored(factors, dtype, gaussian)
    v = stored(factors, dtype, lambda n, r: torch.rand(n, r, dtype=torch.float64) + 0.5)
    held, gradients, firsts, seconds = (by_process(factors, whole, dtype) for whole in (Y, G, m, v))
    flats = run("gradient_gram", list(zip(gradients, held, strict=True)))
    sums = torch.stack(flats).sum(0)
    yield "sums dtype", float(sums.dtype != wide), 0.0
    yield from blocks("sums", sums, sums_words, list(zip(G, Y, strict=True)), dtype)
    rows = torch.tensor([SETTINGS] * len(factors), dtype=torch.float64)
    lists = zip(held, gradients, firsts, seconds, strict=True)
    grams_of, steps = zip(*run("adamw_gram_", [(*given, sums, rows) for given in lists]), strict=True)
    grams = torch.stack(grams_of).sum(0)
    settings = dict(zip(NAMES, SETTINGS, strict=True))
    moves = [adamw.adamw_move(*each, **settings) for each in zip(Y, G, m, v, strict=True)]
    # by rows, one factor after another
    steps_of = [step.split([Z.numel() for Z in own]) for step, own in zip(steps, held, strict=True)]
    delta = [
        torch.cat([part.view(-1, factor.r) for part in parts]).double()
        for factor, parts in zip(factors, zip(*steps_of, strict=True), strict=True)
    ]
    for i, (D, first, second) in enumerate(moves):
        # g is ∇ − Y K, of sums of some r products; m and v are stored, the step is not
        own = safety(dtype) * w * math.sqrt(factors[i].r)
        yield "step", relative(delta[i], D), own
        yield "first moment", relative(joined(firsts)[i], first), u + own
        yield "second moment", relative(joined(seconds)[i], second), u + own
    yield from blocks("grams", grams, grams_words, list(zip(delta, Y, strict=True)), dtype)
    infos = run("adamw_rows_", [(own, step, sums, grams) for own, step in zip(held, steps, strict=True)])
    yield from same_everywhere("adamw_rows_", infos)
    for i, found in enumerate(joined(held)):
        wanted = stiefel.polar_retraction(Y[i], stiefel.tangent_projection(Y[i], moves[i][0]))
        yield from retracted("adamw_rows_", found, wanted, infos[0][i], dtype)


def check_separate(dtype: torch.dtype, factors: Sequence[Factor]) -> Iterator[Line]:
    """gradient_gram, riemannian_gradient_rows_, retract_gram, retract_rows_."""
    u, w = round_off(dtype)
    Y = stored(factors, dtype, orthonormal)
    G = stored(factors, dtype, gaussian)
    Z = [(each + 0.1 * gaussian(*each.shape)).to(dtype).double() for each in Y]
    held, gradients, moved = (by_process(factors, whole, dtype) for whole in (Y, G, Z))
    snapshots = by_process(factors, [torch.zeros_like(each) for each in Y], dtype)
    sums = torch.stack(run("gradient_gram", list(zip(gradients, held, strict=True)))).sum(0)
    run("riemannian_gradient_rows_", [(*each, sums) for each in zip(gradients, held, snapshots, strict=True)])
    for i, (found, kept) in enumerate(zip(joined(gradients), joined(snapshots), strict=True)):
        tolerance = u + safety(dtype) * w * math.sqrt(factors[i].r)
        yield "gradient", relative(found, stiefel.riemannian_gradient(Y[i], G[i])), tolerance
        yield "snapshot", float(not kept.equal(Y[i])), 0.0
    divisors = [2.0] * len(factors)
    grams = torch.stack(run("retract_gram", [(*each, divisors) for each in zip(moved, held, strict=True)])).sum(0)
    delta = [(new - old) / 2.0 for new, old in zip(Z, Y, strict=True)]
    yield from blocks("grams", grams, grams_words, list(zip(delta, Y, strict=True)), dtype)
    infos = run("retract_rows_", [(*each, divisors, sums, grams) for each in zip(moved, held, strict=True)])
    yield from same_everywhere("retract_rows_", infos)
    for i, found in enumerate(joined(moved)):
        yield from retracted("retract_rows_", found, stiefel.project_retract(Y[i], Z[i], 2.0), infos[0][i], dtype)
        drift = float(stiefel.orthonormality_error(Y[i]))
        yield "drift", abs(float(infos[0][i, 4]) - drift), w * (len(Y[i]) + 8.0) * factors[i].r


def check_long(dtype: torch.dtype, processes: int, lengths: Sequence[float]) -> Iterator[Line]:
    """Steps of one column each of those lengths, the longest first; for NaN, a factor that has no rank left.

    Long ones are bounded by what is reported, and a second retraction takes them to round-off.
    """
    u, w = round_off(dtype)
    factors = [Factor(4, (30, 4)[:processes]) for _ in lengths]
    Y = stored(factors, dtype, orthonormal)
    Z = [each.clone() for each in Y]
    for each, new, length in zip(Y, Z, lengths, strict=True):
        if math.isnan(length):
            each[:, 1] = new[:, 1] = 0.0
        else:
            new[:, 0] += length * orthonormal(len(new), 1)[:, 0]
    Z = [each.to(dtype).double() for each in Z]
    previous, moved = by_process(factors, Y, dtype), by_process(factors, Z, dtype)
    sums, grams, infos = retract(moved, previous)
    yield from same_everywhere("long", infos)
    ones = [1.0] * len(factors)
    again = by_process(factors, Z, dtype)
    wanted = reference.retract_rows_(signatures.RetractRows(again[0], previous[0], ones, sums, grams))
    yield "the reference's statuses", float(not wanted[:, 0].equal(infos[0][:, 0])), 0.0
    for i, (length, row) in enumerate(zip(lengths, infos[0], strict=True)):
        (_, C), (A, D) = (sharded.unpacked(flat.view(len(lengths), -1)[i], 4) for flat in (sums, grams))
        found, reported = joined(moved)[i], float(row[1])
        if math.isnan(length):
            yield "no rank", float(row[0] != 2.0 or not math.isnan(reported)), 0.0
            yield "no rank, written", float(not found.equal(Z[i])), 0.0
            continue
        M = Y[i] + stiefel.tangent_projection(Y[i], Z[i] - Y[i])
        yield "path", float(row[3] != (1.0 if length >= 4.0 else 0.0)), 0.0
        yield "long value", relative(found, stiefel.polar_factor(M)), reported + u
        measured = float(stiefel.orthonormality_error(found))
        # the algebra's own round-off in float64, which float64's bound is of as well, and the measurement's
        yield "long residual above the reported", measured - reported, 1e-15 if dtype == torch.float64 else 0.0
        if length >= 4.0:  # as operators/phases.py has it; two spectral norms are known to 2 % each, one is squared
            solution = sharded.solve(C, A, D)
            error = 8 * math.sqrt(factors[i].r) * w * solution.condition * max(1.0, solution.growth)
            yield "long reported residual", reported, 1.08 * error + 2.1 * u * math.sqrt(factors[i].r)
            yield "long reported residual, from below", 0.9 * error - reported, 0.0
    far = [[parts[0]] for parts in moved]
    _, _, polished = retract(far, [[part.clone() for part in parts] for parts in far])
    # the long factor is near orthonormal now, within what was reported: to that the square of it is nothing
    yield from retracted("polished", *joined(far), stiefel.polar_factor(joined(moved)[0]), polished[0][0], dtype)


def retract(processes: list[list[Tensor]], previous: list[list[Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """gradient_gram, retract_gram, retract_rows_ from ``previous``: sums, grams, infos."""
    ones = [1.0] * len(previous[0])
    sums = torch.stack(run("gradient_gram", [(each, each) for each in previous])).sum(0)
    grams = torch.stack(run("retract_gram", [(*each, ones) for each in zip(processes, previous, strict=True)])).sum(0)
    return sums, grams, run("retract_rows_", [(*z, ones, sums, grams) for z in zip(processes, previous, strict=True)])


def check_gradients() -> Iterator[Line]:
    """What the norm says of gradients that are large or not finite; the other factors' sums are as they were."""
    for dtype, large in ((torch.float32, 1e25), (torch.float64, 1e200)):
        Y = [orthonormal(40, 4, dtype=dtype) for _ in range(4)]
        G = [torch.randn_like(each) for each in Y]
        plain = run("gradient_gram", [(G, Y)])[0].view(4, -1)
        G[0][37, 2], G[1][3, 0], G[2][39, 3] = large, math.nan, -math.inf
        sums = run("gradient_gram", [(G, Y)])[0].view(4, -1)
        norm = sums[:, -1]
        yield "norm of a large gradient", float(not min(large, 1e30) * 0.999 <= float(norm[0]) <= 1e30), 0.0
        yield "norm of one that is not finite", float(not bool(norm[1:3].isnan().all())), 0.0
        yield "its factor", float(not sums[1, 16:-1].equal(plain[1, 16:-1])), 0.0
        yield "the others", float(not sums[3].equal(plain[3])), 0.0


def check_nothing() -> Iterator[Line]:
    """A process that has no rows of any factor, and a call without factors."""
    Y = [torch.empty(0, 4), torch.empty(3, 0).mT]
    flat = run("gradient_gram", [(Y, Y)])[0]
    yield "sums of nothing", float(flat.shape != (sums_words(4) + sums_words(3),) or bool(flat.any())), 0.0
    rows = torch.tensor([SETTINGS] * 2, dtype=torch.float64)
    grams, steps = run("adamw_gram_", [(Y, Y, Y, Y, flat, rows)])[0]
    yield "grams of nothing", float(bool(grams.any()) or steps.numel() > 0), 0.0
    empty = run("gradient_gram", [([], [])])[0]
    yield (
        "no factors",
        float(empty.numel() > 0 or run("retract_rows_", [([], [], [], empty, empty)])[0].numel() > 0),
        0.0,
    )


def check_refusals() -> Iterator[Line]:
    """Also where the tensors have been met before."""
    Y = [orthonormal(20, 4, dtype=torch.float32)]
    Z = [Y[0] + 0.1]
    sums, grams = run("gradient_gram", [(Y, Y)])[0], run("retract_gram", [(Z, Y, [1.0])])[0]
    run("retract_rows_", [(Z, Y, [1.0], sums, grams)])
    kept = Z[0].clone()
    for given, message in (
        ((Y, torch.zeros(79), sums, grams), "adamw_rows_: steps: found (79,)"),
        ((Z, Y, [1.0], sums[:-1], grams), "retract_rows_: sums: found (26,)"),
        ((Z, Y, [1.0], sums, grams.double()), "retract_rows_: grams: found (26,), torch.float64"),
        ((Z, Y, [0.0], sums, grams), "retract_rows_: divisors[0]: found 0.0"),
        ((Z, Z, [1.0], sums, grams), "retract_rows_: moved[0]: found memory that previous[0] has as well"),
    ):
        try:
            run(message.split(":")[0], [given])
        except RuntimeError as error:
            yield f"refusal, of {message}: {error}", float(not str(error).startswith(message)), 0.0
        else:
            yield message, 1.0, 0.0
    yield "what was refused", float(not Z[0].equal(kept)), 0.0


def check_launches() -> Iterator[Line]:
    """As many for many factors as for one."""
    launched: list[str] = []
    call = interpreter.GridExecutor.__call__

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        launched.append(self.fn.__name__)
        return call(self, *arguments, **named)

    interpreter.GridExecutor.__call__ = counted
    found = []
    for shapes in ([(20, 3)], [(20, 3), (2, 5), (33, 1), (0, 4)]):
        launched.clear()
        Y = [torch.randn(n, r) for n, r in shapes]
        G, m, v = ([torch.ones_like(each) for each in Y] for _ in range(3))
        rows, ones = torch.tensor([SETTINGS] * len(Y), dtype=torch.float64), [1.0] * len(Y)
        run("gradient_gram", [(G, Y)])
        zeros = [torch.zeros(r, r) for _, r in shapes]
        sums = torch.cat([sharded.packed((zero, zero + torch.eye(len(zero))), zero[0, :1]) for zero in zeros])
        grams, steps = run("adamw_gram_", [(Y, G, m, v, sums, rows)])[0]
        run("adamw_rows_", [(Y, steps, sums, grams.zero_())])
        run("riemannian_gradient_rows_", [(G, Y, [], sums)])
        run("retract_gram", [(m, Y, ones)])
        run("retract_rows_", [(m, Y, ones, sums, grams)])
        found.append(list(launched))
    interpreter.GridExecutor.__call__ = call
    yield f"launches {found}", float(found[0] != found[1] or len(found[0]) > 15), 0.0


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    triton_launches.record()
    round_to_bfloat16()
    permute_programs()
    small_tiles()

    def report(case: str, lines: Iterator[Line]) -> None:
        for what, error, tolerance in lines:
            print(json.dumps({"case": case, "what": what, "error": error, "tolerance": tolerance}), flush=True)

    for dtype, factors in FUSED:
        report(f"fused {dtype}", check_fused(dtype, factors))
    for dtype, factors in SEPARATE:
        report(f"separate {dtype}", check_separate(dtype, factors))
    report("long float32", check_long(torch.float32, 1, (100.0, 0.3, math.nan)))
    report("long float64", check_long(torch.float64, 2, (1e4,)))
    report("gradients", check_gradients())
    report("nothing", check_nothing())
    report("refusals", check_refusals())
    report("launches", check_launches())
    for launch in triton_launches.launches.values():
        print(json.dumps({"launch": launch}), flush=True)


if __name__ == "__main__":
    main()

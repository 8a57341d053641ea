"""One linear layer with its adapter, forward and backward: frozen base, PEFT's LoRA, StelLA as published, ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from bench.adapter.lora import lora
from bench.common.device import CPU, as_trained
from bench.common.saved import saved_bytes
from bench.common.timing import (
    Machine,
    Verdict,
    interleaved_samples,
    machine_of,
    machine_probes,
    milliseconds,
    paired_ratio,
)
from stella_kernels import StellaLinear

LARGE = (4096, 4096)  # the layer of which the overhead is promised
SMALL = (1536, 576)  # SmolLM2's up projection
WANTED_WITH_DROPOUT = 1.3  # at least so many times faster than LoRA
WANTED_SHARES = 2.0  # overhead over the frozen base, in shares of the arithmetic, at most
FEWEST_TOKENS = 2048  # promises are for this many rows and more


@dataclass(frozen=True)
class Case:
    """One layer, (m, n), with an adapter of rank r, on T rows."""

    tokens: int
    m: int
    n: int
    r: int
    dropout: float
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"T = {self.tokens}, {self.m} × {self.n}, r = {self.r}, dropout {self.dropout:g}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def base_flops(self) -> float:
        """Output and input gradient: the weight is frozen."""
        return 4.0 * self.tokens * self.m * self.n

    @property
    def adapter_flops(self) -> float:
        """A, P Uᵀ, Q, K Vᵀ and the gradients of U and V (DESIGN 3.1); then P, K and the gradient of S."""
        return 6.0 * self.tokens * self.r * (self.m + self.n) + 6.0 * self.tokens * self.r**2

    @property
    def share(self) -> float:
        return self.adapter_flops / self.base_flops


def cases(full: bool = False, device: torch.device = CPU) -> list[Case]:
    """A few minutes' worth, or all that the promises speak of (an hour and more on a CPU)."""
    if full:
        return [
            Case(tokens, *shape, r, dropout, dtype)
            for dtype, shape in ((torch.float32, LARGE), (torch.float32, SMALL), (torch.bfloat16, SMALL))
            for tokens in (512, 2048, 8192)
            for r in (8, 16, 32, 64)
            for dropout in (0.0, 0.05)
        ]
    chosen = [Case(2048, *LARGE, 8, 0.0), Case(2048, *LARGE, 64, 0.0), Case(2048, *SMALL, 16, 0.0)]
    chosen += [Case(8192, *SMALL, 32, 0.0), Case(512, *SMALL, 16, 0.0, torch.bfloat16)]
    if device.type == "cuda":  # as models are trained there, and of the size that bench.traffic.adapter counts
        chosen += [Case(4096, *LARGE, r, 0.0, torch.bfloat16) for r in (16, 64)]
    return [replace(case, dropout=dropout) for case in chosen for dropout in (0.0, 0.05)]


class Published(nn.Module):
    """The adapter as three linear layers on the dropped-out input, added to the base's output (arXiv 2510.01938)."""

    def __init__(self, base: nn.Linear, r: int, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        device = base.weight.device
        self.Vt = nn.Linear(base.in_features, r, bias=False, device=device)
        self.S = nn.Linear(r, r, bias=False, device=device)
        self.U = nn.Linear(r, base.out_features, bias=False, device=device)
        self.scaling = 1.0

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        wide = x.to(self.Vt.weight.dtype)  # factors are float32 beside a bfloat16 base
        result = result + self.U(self.S(self.Vt(self.dropout(wide)))) * self.scaling
        return result.to(x.dtype)


LAYERS: dict[str, Callable[[nn.Linear, int, float], nn.Module]] = {
    "base": lambda base, r, dropout: base,
    "lora": lora,
    "published": Published,
    "ours": lambda base, r, dropout: StellaLinear(base, r=r, dropout=dropout),
}


@dataclass(frozen=True)
class Problem:
    """The layers of a case on one frozen weight, and their input and output gradient."""

    layers: dict[str, nn.Module]
    x: Tensor
    grad_y: Tensor

    def forward(self, name: str) -> Tensor:
        """The layer's output, made as trainers make it on the device."""
        with as_trained(self.x.device, self.x.dtype):
            return self.layers[name](self.x)

    def step(self, name: str) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the input and of what the layer trains."""
        wanted = [self.x, *(p for p in self.layers[name].parameters() if p.requires_grad)]
        return torch.autograd.grad(self.forward(name), wanted, self.grad_y)

    def saved_bytes(self, name: str) -> int:
        """Bytes that a forward pass keeps for backward, beyond the input and the parameters."""
        return saved_bytes(lambda: self.forward(name), (self.x, *self.layers[name].parameters()))[1]


def problem(case: Case, names: Sequence[str] = tuple(LAYERS), device: torch.device = CPU) -> Problem:
    """Fresh random data of a case, drawn on the CPU for every device; every layer has the same base."""
    generator = torch.Generator().manual_seed(case.tokens + case.r)
    base = nn.Linear(case.n, case.m, dtype=case.dtype, device=device).requires_grad_(False)
    layers = {name: LAYERS[name](base, case.r, case.dropout).train() for name in names}
    x = torch.randn(case.tokens, case.n, generator=generator).to(device, case.dtype).requires_grad_()
    return Problem(layers, x, torch.randn(case.tokens, case.m, generator=generator).to(device, case.dtype))


@dataclass(frozen=True)
class Row:
    """Seconds of each layer in each round, and what it keeps for backward."""

    case: Case
    samples: dict[str, list[float]]
    saved: dict[str, int]
    machine: Machine

    def seconds(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def over(self, name: str, below: str) -> float:
        return paired_ratio(self.samples, name, below)

    @property
    def shares(self) -> float:
        """Our overhead over the frozen base, in shares of the arithmetic."""
        return (self.over("ours", "base") - 1.0) / self.case.share

    def as_dict(self) -> dict[str, object]:
        """The row as plain JSON types."""
        return {
            **asdict(self.case),
            "dtype": self.case.dtype_name,
            "share": self.case.share,
            "seconds": {name: self.seconds(name) for name in self.samples},
            "samples": self.samples,
            "ratio_to_base": {name: self.over(name, "base") for name in self.samples},
            "lora_over_ours": self.over("lora", "ours"),
            "saved_bytes": self.saved,
            "peak_flops": self.machine.flops,
            "copy_bandwidth": self.machine.bandwidth,
        }


def measure(case: Case, seconds: float, device: torch.device = CPU) -> Row:
    """Time every layer on one case for about ``seconds`` in all."""
    given = problem(case, device=device)
    candidates: Mapping[str, Callable[[], object]] = {name: (lambda name=name: given.step(name)) for name in LAYERS}
    samples = interleaved_samples({**machine_probes(device), **candidates}, seconds, device=device)
    return Row(
        case,
        {name: samples[name] for name in LAYERS},
        {name: given.saved_bytes(name) for name in LAYERS},
        machine_of(samples, device),
    )


def title(device: torch.device) -> str:
    """What the table is of."""
    how = ", bfloat16 under torch.autocast" if device.type == "cuda" else ""
    return f"One linear layer and its adapter, forward and backward{how}."


FORMULA = (
    "extra: time over the frozen base, median of the rounds' ratios; share: flops of the adapter, 6 T r (m + n + r), "
    "of those of the base, 4 T m n.\nkept: bytes kept for backward beyond input and parameters, in units of the input."
)
HEADER = (
    f"{'T':>5} {'m × n':>11} {'r':>3} {'drop':>5} {'dtype':>8} | {'base':>9} {'LoRA':>8} {'published':>9} "
    f"{'ours':>8} | "
    f"{'share':>6} {'of which ours':>13} {'LoRA/ours':>9} | {'kept: LoRA':>10} {'publ.':>6} {'ours':>6} | peak copy"
)


def table_row(row: Row) -> str:
    """One line of the table on the terminal: milliseconds of the base, and each layer's extra."""
    case = row.case
    extra = " ".join(
        f"{row.over(name, 'base') - 1:+{width}.1%}" for name, width in (("lora", 8), ("published", 9), ("ours", 8))
    )
    unit = case.tokens * case.n * case.dtype.itemsize
    widths = (("lora", 10), ("published", 6), ("ours", 6))
    kept = " ".join(f"{row.saved[name] / unit:{width}.3f}" for name, width in widths)
    return (
        f"{case.tokens:5d} {f'{case.m} × {case.n}':>11} {case.r:3d} {case.dropout:5g} {case.dtype_name:>8} | "
        f"{milliseconds(row.seconds('base'), 6, 1)} ms {extra} | {case.share:6.1%} {row.shares:11.1f} × "
        f"{row.over('lora', 'ours'):9.3f} | {kept} | {row.machine.flops / 1e9:4.0f} {row.machine.bandwidth / 1e9:4.0f}"
    )


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """What the package promises of a layer, each with whether this run bore it out."""
    for row in rows:
        case = row.case
        if case.tokens >= FEWEST_TOKENS:
            found, wanted = row.over("lora", "ours"), WANTED_WITH_DROPOUT if case.dropout else 1.0
            yield Verdict(found >= wanted, f"{case.name}: {found:.3f} times faster than PEFT's LoRA, wanted {wanted:g}")
            if (case.m, case.n) == LARGE:
                yield Verdict(
                    row.shares <= WANTED_SHARES,
                    f"{case.name}: over the frozen base {row.shares:.2f} times the arithmetic's share, "
                    f"wanted at most {WANTED_SHARES:g}",
                )
        ours, lora = row.saved["ours"], row.saved["lora"]
        yield Verdict(
            ours <= (lora / 2 if case.dropout else lora),
            f"{case.name}: keeps {ours} bytes for backward beyond the input, LoRA {lora}, "
            f"wanted {'less than half' if case.dropout else 'at most as many'}",
            timed=False,
        )

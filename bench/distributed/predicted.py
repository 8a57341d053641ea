"""A model of the step on many GPUs: what rings send, over links of published rates. Predicted, never measured."""

from __future__ import annotations

from bench.common.shapes import LLAMA_3_8B, LLAMA_3_8B_LAYERS
from bench.distributed.ways import shapes

RANKS = (8, 64, 256, 1024)
NODE = 8  # GPUs that share NVLink
# bytes a second that a GPU sends: NVLink of an H100 (900 GB/s both ways), and one 400 Gb/s InfiniBand port a GPU
NVLINK, INFINIBAND = 450e9, 50e9
HOP = 5e-6  # seconds a hop of a ring adds, launch and latency
MEMORY = 3.35e12  # bytes a second of an H100's memory, of which a step reaches some 80 %


def sums_bytes(r: int) -> float:
    """Of the two sums of a step over all factors, float32 words: 3 r² + r + 1 a factor."""
    return 4.0 * (3 * r * r + r + 1) * len(shapes(LLAMA_3_8B_LAYERS, r))


def factors_bytes(r: int) -> float:
    """Of every factor and its gradient."""
    return 2 * 4.0 * sum(n * r for n, _ in shapes(LLAMA_3_8B_LAYERS, r))


def ring(total: float, ranks: int, turns: int, collectives: int) -> float:
    """Seconds of collectives over ``total`` bytes: the slowest link decides, and every hop adds its latency."""
    rate = NVLINK if ranks <= NODE else INFINIBAND
    return turns * total * (ranks - 1) / ranks / rate + collectives * turns * (ranks - 1) * HOP


def local_seconds(r: int, ranks: int) -> float:
    """Of the passes over a rank's own rows: eleven readings and writings of what a factor takes."""
    return 11 * factors_bytes(r) / 2 / ranks / (0.8 * MEMORY)


def table() -> str:
    """Milliseconds of a step of all factors of a Llama-3-8B."""
    lines = [
        f"Predicted, not measured: a step of all factors of a {LLAMA_3_8B.name} on H100s, milliseconds. Rings over "
        f"NVLink up to {NODE} GPUs, over",
        "one 400 Gb/s port a GPU beyond; every hop 5 µs. sent: MB a rank of the two sums; gathered: every factor and "
        "its gradient.",
        f"{'r':>5}{'ranks':>7}{'sums, sent':>12}{'sums':>9}{'own rows':>10}{'sharded':>10}"
        f"{'gathered, sent':>16}{'gathered':>10}",
    ]
    for r in (16, 64):
        for ranks in RANKS:
            sums = ring(sums_bytes(r), ranks, 2, 2)
            local = local_seconds(r, ranks)
            gather = ring(factors_bytes(r), ranks, 1, 2) + local_seconds(r, 1)
            part = (ranks - 1) / ranks / 1e6
            lines.append(
                f"{r:>5}{ranks:>7}{2 * sums_bytes(r) * part:>12.1f}{sums * 1e3:>9.2f}{local * 1e3:>10.3f}"
                f"{(sums + local) * 1e3:>10.2f}{factors_bytes(r) * part:>16.0f}{gather * 1e3:>10.2f}"
            )
    return "\n".join(lines)

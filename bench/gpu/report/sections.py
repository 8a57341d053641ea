"""The report's sections: each from the records of a report its title and its text, or nothing where there are none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.gpu.report.measured import records
from bench.gpu.report.tables import cell, ms, rate, rows, times, us

Report = dict[str, Any]
Section = tuple[str, str] | None
BYTES = (
    "MB are the bytes that our kernels load and store for the factors (counted in Triton's interpreter for one factor "
    "of this rank, or where that was not done those of their passes); GB/s and of copy say how fast they went, beside "
    "a copy that was measured in the same run."
)


# Words an element of the passes over the factors where nothing stays in cache from one to the next: a step's gradient
# and factor, all four and two written, three and one written; a retraction's; a polar factor's.
PASSES = {"stella_adamw_": 12, "project_retract_": 5, "polar": 3}


def moved_bytes(report: Report, operator: str, r: int, elements: int) -> tuple[float, str]:
    """Bytes of an operator over so many elements: counted in the interpreter, else those of its passes alone."""
    counted = [one["words"] for one in records(report, "count") if (one["operator"], one["r"]) == (operator, r)]
    return 4.0 * elements * (counted[0] if counted else PASSES[operator]), "counted" if counted else "passes"


def machine(report: Report) -> Section:
    groups = records(report, "facts")
    if not groups:
        return None
    lines = [(group["title"], name, value) for group in groups for name, value in group["values"].items()]
    return "The machine", rows(("", "what", "found"), lines)


def ceilings(report: Report) -> Section:
    found = records(report, "ceiling")
    if not found:
        return None
    lines = []
    for one in found:
        text = us(one["seconds"]) + " us" if "launch" in one["name"] else f"{one['rate'] / 1e9:.4g} G{one['unit']}"
        lines.append((one["name"], text, ms(one["seconds"])))
    told = "The best of some runs each, the launch's the median. A copy's bytes are those read and those written.\n\n"
    return "What this machine reaches at best", told + rows(("", "reached:", "ms:"), lines)


def correctness(report: Report) -> Section:
    cases = records(report, "case")
    if not cases:
        return None
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[case["operator"], case["dtype"]].append(case)
    lines = []
    for (operator, dtype), some in groups.items():
        worst = max(some, key=_of_tolerance)
        right = sum(case["passed"] for case in some)
        mark = "" if right == len(some) else "**MISSED**"
        lines.append((operator, dtype, f"{right} of {len(some)}", f"{_of_tolerance(worst):.2g}", worst["name"], mark))
    told = (
        "Relative Frobenius error against the float64 reference, in parts of a tolerance that is derived from the "
        "round-off of the dtype (1 is the most that passes); outputs hold NaN before each call.\n\n"
    )
    missed = [f"- {cell(case['name'])}: {cell(case['what'])}, error {case['error']}, tolerance {case['tolerance']}\n"
              for case in cases if not case["passed"]][:20]  # fmt: skip
    header = ("operator", "dtype", "right:", "worst, of tolerance:", "which was", "")
    return "Is it right?", told + rows(header, lines) + "".join(["\n", *missed] if missed else [])


def _of_tolerance(case: dict[str, Any]) -> float:
    error, tolerance = float(case["error"]), float(case["tolerance"])
    return 0.0 if error == 0.0 else error / tolerance if tolerance and error == error else float("inf")


def behaviour(report: Report) -> Section:
    lines = [
        (stage["stage"], "holds" if record["met"] else "**FAILS**", record["text"])
        for stage in report["stages"]
        if stage["stage"] in ("features", "tests", "sanitizer")
        for record in stage["records"]
        if record["kind"] == "verdict"
    ]
    return ("Graphs, streams, odd sizes, memory", rows(("stage", "", "what"), lines)) if lines else None


def layers(report: Report) -> Section:
    found = [(stage, row) for stage in ("adapter", "tuned") for row in records(report, "layer", stage)]
    if not found:
        return None
    lines = []
    for stage, row in found:
        taken = row["seconds"]
        extra = taken["ours"] - taken["base"]
        lines.append((
            "tuned" if stage == "tuned" else "default", f"{row['m']} × {row['n']}", row["tokens"], row["r"],
            f"{row['dropout']:g}", row["dtype"], *(ms(taken[name]) for name in ("base", "lora", "published", "ours")),
            times(row["lora_over_ours"]), ms(taken["lora"] - taken["base"]), ms(extra),
            f"{row['floor_bytes'] / 1e6:.3g}", *rate(row["floor_bytes"], extra, row["copy_bandwidth"]),
        ))  # fmt: skip
    told = (
        "Forward and backward of one linear layer (m × n) on T rows, all in the same rounds. LoRA / ours above 1: ours "
        "is faster. The last three columns are of our time beyond the frozen base's: the bytes that an adapter must "
        "move at least, and how fast they went, beside a copy among the same rounds. "
        f"{' '.join(note['text'] for note in records(report, 'note', 'adapter') if 'LoRA' in note['text'])}.\n\n"
    )
    header = ("tiles", "m × n", "T:", "r:", "dropout:", "dtype", "base ms:", "LoRA ms:", "published ms:", "ours ms:",
              "LoRA / ours:", "LoRA − base ms:", "ours − base ms:", "least MB:", "GB/s:", "of copy:")  # fmt: skip
    return "The adapter", told + rows(header, lines)


def steps(report: Report) -> Section:
    found = records(report, "step")
    if not found:
        return None
    lines = []
    for row in found:
        taken, ratio = row["seconds"], row["ratio_to_adamw"]
        moved, how = moved_bytes(report, "stella_adamw_", row["r"], row["elements"])
        lines.append((
            row["r"], row["layers"], ms(taken["adamw"]),
            rate(28 * row["elements"], taken["adamw"], row["copy_bandwidth"])[1],
            ms(taken["stella_adamw"]), times(ratio["stella_adamw"]), ms(taken["attach"]), times(ratio["attach"]),
            ms(taken["published"]), times(ratio["published"]), times(row["published_over_stella_adamw"]),
            f"{moved / 1e6:.4g} ({how})", *rate(moved, taken["stella_adamw"], row["copy_bandwidth"]),
        ))  # fmt: skip
    told = (
        "All factors of so many layers of a Llama-3-8B, float32, the same tensors for all. AdamW is torch's fused one, "
        "which leaves the manifolds; attach is it with our geometry around it; published is it with a batched "
        "torch.linalg.svd. × is times AdamW. The last columns are StellaAdamW's. "
        f"{BYTES} AdamW's are 7 words an element.\n\n"
    )
    header = ("r:", "layers:", "AdamW ms:", "of copy:", "StellaAdamW ms:", "×:", "attach ms:", "×:", "published ms:",
              "×:",              "published / StellaAdamW:", "MB:", "GB/s:", "of copy:")  # fmt: skip
    return "The optimizer step", told + rows(header, lines)


def retractions(report: Report) -> Section:
    found = records(report, "retract")
    if not found:
        return None
    lines = []
    for row in found:
        taken = dict(row["seconds"])
        ours = taken.pop("native")
        moved, how = moved_bytes(report, "project_retract_", row["r"], row["elements"])
        best = min(taken, key=taken.__getitem__)
        lines.append((
            row["r"], row["layers"], ms(ours), ms(taken["svd"]), times(taken["svd"] / ours),
            f"{ms(taken[best])} ({best})",
            times(taken[best] / ours), f"{moved / 1e6:.4g} ({how})", *rate(moved, ours, row["copy_bandwidth"]),
        ))  # fmt: skip
    header = ("r:", "layers:", "ours ms:", "svd ms:", "× faster:", "best of torch ms:", "× faster:", "MB:", "GB/s:",
              "of copy:")  # fmt: skip
    told = f"The same factors after an optimizer has moved them. {BYTES}\n\n"
    return "Project and retract", told + rows(header, lines)


def polars(report: Report) -> Section:
    found = records(report, "polar")
    if not found:
        return None
    lines = []
    for row in found:
        taken = row["seconds"]
        moved, how = moved_bytes(report, "polar", row["r"], row["batch"] * row["n"] * row["r"])
        lines.append((
            f"{row['batch']} × {row['n']} × {row['r']}", ms(taken["native"]), ms(taken["svd"]),
            ms(taken["linalg_polar"]) if "linalg_polar" in taken else "not there", ms(taken["qr"]),
            f"{ms(taken[row['best_composition']])} ({row['best_composition']})", times(row["ratio_to_svd"]),
            times(row["ratio_to_best_composition"]), f"{moved / 1e6:.4g} ({how})",
            *rate(moved, taken["native"], row["copy_bandwidth"]), f"{float(row['native_error']):.1e}",
            f"{float(row['svd_error']):.1e}",
        ))  # fmt: skip
    header = ("batch × n × r", "ours ms:", "svd ms:", "linalg.polar ms:", "qr ms:", "best of torch ms:", "× svd:",
              "× best:", "MB:", "GB/s:", "of copy:", "error:", "svd's error:")  # fmt: skip
    told = f"float32; errors against a float64 SVD. Ours waits for its own status. {BYTES}\n\n"
    return "The polar factor", told + rows(header, lines)


def models(report: Report) -> Section:
    found = records(report, "model")
    if not found:
        return None
    lines = []
    for row in found:
        taken, peak = row["seconds"], row["peak_bytes"]
        memory = [f"{peak[name] / 2**20:.0f}" if name in peak else "–" for name in ("lora", "ours")]
        lines.append((
            row["mode"], f"{row['dropout']:g}", f"{row['sequences']} × {row['tokens']}", row["dtype"],
            ms(taken["lora"]), ms(taken["ours"]), times(row["ours_over_lora"]), *memory,
        ))  # fmt: skip
    told = (
        "Forward, backward and optimizer of SmolLM2-135M's shape with random weights, adapters of rank "
        f"{found[0]['rank']} on all 7 projections: LoRA with torch's fused AdamW, ours with StellaAdamW. Below 1 ours "
        "is faster. As a graph, forward and backward are one CUDA graph and the optimizer is called eagerly; compiled "
        "is each layer of the model by torch.compile.\n\n"
        + "".join(f"{cell(note['text'])}.\n\n" for note in records(report, "note", "model"))
    )
    header = ("mode", "dropout:", "batch × tokens:", "dtype", "LoRA ms:", "ours ms:", "ours / LoRA:", "LoRA peak MiB:",
              "ours peak MiB:")  # fmt: skip
    return "A whole training step", told + rows(header, lines)


def host(report: Report) -> Section:
    parts, gaps = records(report, "host"), records(report, "gaps")
    if not parts and not gaps:
        return None
    text = ""
    if parts:
        lines = [
            (row["what"], row["candidate"], us(row["host_seconds"]), us(row["whole_seconds"]),
             f"{row['host_seconds'] / row['whole_seconds']:.0%}")
            for row in parts
        ]  # fmt: skip
        text += (
            "A call from an idle GPU: after how long it returns, and after how long the GPU is done. Where both are "
            "nearly the same, the host is what takes the time (or the call waits for the GPU, as StellaAdamW's "
            "does).\n\n" + rows(("what", "", "returns after us:", "done after us:", "host:"), lines)
        )
    if gaps:
        lines = [
            (row["candidate"], f"{row['kernels']:.0f}", ms(row["busy_seconds"]), ms(row["idle_seconds"]),
             f"{row['idle']:.0%}", ms(row["unprofiled_seconds"]),
             ", ".join(f"{gap:.0f}" for gap in row["longest_gaps_us"]))
            for row in gaps
        ]  # fmt: skip
        header = ("", "kernels a step:", "busy ms:", "idle between ms:", "idle:", "unprofiled ms:", "longest gaps us")
        text += (
            "\nOf the eager training step under torch's profiler, which slows the host down: busy is time in which a "
            "kernel ran, idle that in which none did.\n\n" + rows(header, lines)
        )
    return "Where the GPU waits for the host", text


def method(report: Report) -> Section:
    spread = [
        (max(taken) - min(taken)) / median(taken)
        for row in records(report, "step") + records(report, "layer") + records(report, "model")
        for taken in row["samples"].values()
    ]
    told = (
        "Every stage is a process of its own. Candidates of a row are called in turn, after a round that warms up; a "
        "time is the median of its rounds, a ratio the median of the rounds' own ratios. A time is taken by the GPU's "
        "events from an idle stream to the end of the last kernel, so that launches count wherever the GPU waits for "
        "them; the L2 cache is written over before each call. Nothing is timed of an operator that gave a wrong "
        "result. Kernels run with their default tiles but where a row says tuned.\n"
    )
    if spread:
        told += f"\nWithin a row, rounds differ by {median(spread):.0%} of their median (the median of all rows).\n"
    return "How it was measured", told


SECTIONS: tuple[Callable[[Report], Section], ...] = (
    *(correctness, behaviour, models, layers, steps, retractions, polars, host, ceilings, machine, method),
)

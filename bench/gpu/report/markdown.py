"""The report for people: what was run, what of it holds, every figure beside what it is to be held against."""

from __future__ import annotations

from typing import Any

from bench.gpu.report import sections
from bench.gpu.report.measured import facts, records
from bench.gpu.report.tables import cell, rows, times

REHEARSED = "> **Rehearsed on a CPU at toy sizes, not measured. No time on this page means anything.**\n"
STATES = {
    "passed": "everything that was run holds",
    "FAILED": "something that was run does not hold",
    "not run": "nothing of it was run",
    "KILLED at its limit": "killed at its time limit; what it had found by then counts",
    "INTERRUPTED": "the run was ended from outside; what it had found by then counts",
    "BROKE OFF": "its process ended in an error; what it had found by then counts",
}


def page(report: dict[str, Any], pictured: bool) -> str:
    """The whole page."""
    warning = [REHEARSED] if report["rehearsed"] else []
    parts = [f"# stella_kernels on {_chip(report)}\n", *warning, _head(report), _verdict(report), _in_short(report)]
    parts.append(_stages(report))
    if pictured:
        parts.append("![the timed tables as bars](report.png)\n")
    for section in sections.SECTIONS:
        if text := section(report):
            title, body = text
            parts += [f"## {title}\n", *warning, body]
    parts += ["## Not run, and why\n", _missing(report), "## What to do with this folder\n", _what_next(report)]
    return "\n".join(parts)


def _chip(report: dict[str, Any]) -> str:
    return "no GPU (a rehearsal)" if report["rehearsed"] else str(facts(report, "GPU").get("name", report["chip"]))


def _head(report: dict[str, Any]) -> str:
    software, gpu, checkout = facts(report, "software"), facts(report, "GPU"), facts(report, "checkout")
    known = [
        f"{report['date']}, `python -m bench gpu{' --rehearse' if report['rehearsed'] else ''}`, "
        f"{report['seconds']:.0f} s of at most {60 * report['minutes']:.0f} s",
        f"stella_kernels {software.get('stella_kernels', '?')}, commit {checkout.get('commit', '?')}"
        + (f" with {checkout['changed files']} changed files" if checkout.get("changed files") else ""),
        f"torch {software.get('torch', '?')} (CUDA {software.get('CUDA of torch', '?')}), Triton "
        f"{software.get('triton', '?')}, Python {software.get('python', '?')}, "
        f"driver {gpu.get('nvidia-smi driver_version', 'unknown')}",
    ]
    return "".join(f"- {line}\n" for line in known)


def _verdict(report: dict[str, Any]) -> str:
    bad = [stage for stage in report["stages"] if stage["status"] not in ("passed", "not run")]
    idle = [stage["stage"] for stage in report["stages"] if stage["status"] == "not run"] + report["not_reached"]
    text = "nothing failed" if not bad else f"did not pass: {', '.join(s['stage'] for s in bad)}"
    text += f"; not run: {', '.join(idle)}" if idle else ""
    begun = "" if report["complete"] else " The run had not come to its end when this page was written."
    failed = [f"- **fails**: {cell(record['text'])}\n" for s in report["stages"] for record in s["records"]
              if record["kind"] == "verdict" and not record["met"]]  # fmt: skip
    return f"**{text[0].upper()}{text[1:]}.**{begun}\n\n" + "".join(failed)


def _in_short(report: dict[str, Any]) -> str:
    """The figures that most will look for, each with what it is beside."""
    cases = records(report, "case")
    right, whole = sum(case["passed"] for case in cases), max((t["cases"] for t in records(report, "table")), default=0)
    lines = [f"- **Right**: {right} of {len(cases)} cases that were run; the table has {whole}"] if cases else []
    if report["rehearsed"]:
        lines.append("- the ratios that follow are of toys on a CPU, and mean nothing")
    for row in records(report, "model"):
        lines.append(
            f"- **Training step**, SmolLM2-135M's shape, {row['mode']}, dropout {row['dropout']:g}: "
            f"{times(row['ours_over_lora'])} × the step with LoRA and fused AdamW (wanted: at most 1)"
        )
    for row in records(report, "step")[:2]:
        lines.append(
            f"- **Optimizer step**, r = {row['r']}, {row['layers']} layers of a Llama-3-8B: "
            f"{times(row['ratio_to_adamw']['stella_adamw'])} × fused AdamW, "
            f"{times(row['published_over_stella_adamw'])} times faster than as published"
        )
    for row in records(report, "layer", "adapter")[:2]:
        lines.append(
            f"- **Layer**, {row['m']} × {row['n']}, T = {row['tokens']}, r = {row['r']}, dropout {row['dropout']:g}, "
            f"{row['dtype']}: LoRA takes {times(row['lora_over_ours'])} times as long (wanted: at least 1)"
        )
    return "\n".join(lines) + "\n"


def _stages(report: dict[str, Any]) -> str:
    lines = []
    for stage in report["stages"]:
        verdicts = [record["met"] for record in stage["records"] if record["kind"] == "verdict"]
        held = f"{sum(verdicts)} of {len(verdicts)} hold" if verdicts else ""
        lines.append((stage["stage"], stage["tells"], stage["status"], held, f"{stage['seconds']:.0f} s"))
    used = sorted({stage["status"] for stage in report["stages"]})
    legend = "; ".join(f"*{state}*: {STATES[state]}" for state in used)
    return rows(("stage", "what it tells", "status", "verdicts", "took:"), lines) + f"\n{legend}.\n"


def _missing(report: dict[str, Any]) -> str:
    lines = [f"- {stage['stage']}: {cell(record['text'])}\n" for stage in report["stages"]
             for record in stage["records"] if record["kind"] == "missing"]  # fmt: skip
    lines += [f"- {name}: the run ended before it\n" for name in report["not_reached"]]
    for stage in report["stages"]:
        if stage["tail"]:
            lines.append(
                f"- {stage['stage']}: {stage['status']} after {stage['seconds']:.0f} s; the last it printed:\n"
            )
            lines.append("\n  ```text\n" + "".join(f"  {line[:200]}\n" for line in stage["tail"]) + "  ```\n")
    return "".join(lines) or "Everything was run.\n"


def _what_next(report: dict[str, Any]) -> str:
    if report["rehearsed"]:
        return "Nothing: a rehearsal shows that every stage runs, and is kept out of `bench/measured/`.\n"
    return (
        "Attach it to an issue as it is, or commit it as `bench/measured/"
        f"{report['chip']}/` and put the output of `python -m bench gpu --table` into `docs/gpus.md`. It holds "
        "`report.md` (this page), `report.json` (the same with every sample), `report.png`, `log.txt` (all that the "
        "stages printed, without the paths of this machine), `records/` (each stage's lines) and `tiles/` (what tuning "
        "chose). It names the GPU, its driver, the processor and versions of software; no host, no user.\n"
    )

"""``python -m bench``: the polar factor at real models' shapes, the optimizer step of a Llama-3-8B, and the adapter.

``python -m bench polar``, ``step`` or ``adapter`` runs one of the three, ``--device cuda`` on a GPU; ``python -m bench
gpu`` is all that a person with a GPU can find out in some minutes, with options of its own. Without a GPU, ``python -m
bench traffic`` counts what a step moves there, ``host`` measures what its host takes, and ``distributed`` steps over
several processes. ``accuracy``, with options of its own, trains StelLA beside LoRA (bench/accuracy/PROTOCOL.md). Tables
on the terminal, JSON and plots in ``--output``; exits with 1 where a promise was missed; none is made of a GPU's times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.common.device import DeviceUnavailableError, keep_memory, measures_memory, named, platform_of, served
from bench.common.shapes import LLAMA_3_8B, MODELS, RANKS, cases
from bench.common.timing import Machine, Verdict, measure_machine


def _write(path: Path, machine: Machine, device: torch.device, **rows: object) -> None:
    record = {
        "torch": str(torch.__version__),
        "platform": platform_of(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "peak_flops": machine.flops,
        "copy_bandwidth": machine.bandwidth,
        **rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


def _judge(verdicts: Iterable[Verdict], device: torch.device) -> bool:
    if device.type != "cpu":
        print("no promise is made of a GPU's times: its authors have measured none")
        verdicts = [verdict for verdict in verdicts if not verdict.timed]
    every = True
    for verdict in verdicts:
        print(f"{'met   ' if verdict.met else 'MISSED'}  {verdict.text}")
        every = every and verdict.met
    return every


def _polar(ranks: tuple[int, ...], seconds: float, machine: Machine, output: Path, device: torch.device) -> bool:
    # Here and below, what a table needs is imported when it runs: the adapter's loads libraries of whole models.
    from bench.stiefel import polar
    from bench.stiefel.plot import save_polar_plot

    print("\nPolar factor of a batch of float32 factors.")
    for model in MODELS:
        print(f"  {model.name}: factor heights n = {', '.join(map(str, model.heights))}")
    print(polar.HEADER, flush=True)
    rows = []
    for case in cases(ranks):
        rows.append(polar.measure(case, machine, seconds, device))
        print(polar.table_row(rows[-1]), flush=True)
    _write(output / "polar.json", machine, device, rows=[row.as_dict() for row in rows])
    save_polar_plot(rows, output / "polar.png", str(machine))
    return _judge(polar.verdicts(rows), device)


def _step(
    ranks: tuple[int, ...], seconds: float, machine: Machine, output: Path, device: torch.device, memory: bool
) -> bool:
    from bench.stiefel import retract, step
    from bench.stiefel.plot import save_step_plot

    projections = ", ".join(f"{name} {m}×{n}" for name, (m, n) in LLAMA_3_8B.projections.items())
    print(f"\nProject and retract, the factors of the linear layers of a {LLAMA_3_8B.name} ({projections}), float32.")
    print("peak and copy, GFLOP/s and GB/s, are measured among a row's own runs: low ones are those of a busy machine.")
    print(f"{retract.FORMULA}\n{retract.HEADER}", flush=True)
    retractions = []
    for r in ranks:
        retractions.append(retract.measure(r, seconds / 2, device))
        print(retract.table_row(retractions[-1]), flush=True)
    print(f"\nThe whole optimizer step of the same factors.\n{step.FORMULA}\n{step.HEADER}", flush=True)
    steps = []
    for r in ranks:
        steps.append(step.measure(r, seconds, memory and measures_memory(device), device))
        print(step.table_row(steps[-1]), flush=True)
    _write(
        output / "step.json",
        machine,
        device,
        step=[row.as_dict() for row in steps],
        project_retract=[row.as_dict() for row in retractions],
    )
    best = Machine(
        flops=max(row.machine.flops for row in (*steps, *retractions)),
        bandwidth=max(row.machine.bandwidth for row in (*steps, *retractions)),
        where=machine.where,
    )
    save_step_plot(steps, retractions, best, output / "step.png", str(best))
    return _judge((*step.verdicts(steps), *retract.verdicts(retractions)), device)


def _adapter(full: bool, seconds: float, machine: Machine, output: Path, device: torch.device, memory: bool) -> bool:
    from bench.adapter import layer as adapter
    from bench.adapter import model as adapter_model

    print(f"\n{adapter.title(device)}\n{adapter.FORMULA}\n{adapter.HEADER}", flush=True)
    rows = []
    for case in adapter.cases(full, device):
        rows.append(adapter.measure(case, seconds, device))
        print(adapter.table_row(rows[-1]), flush=True)
    print(f"\n{adapter_model.title(device)}\n{adapter_model.HEADER}", flush=True)
    steps = []
    for dropout in adapter_model.DROPOUTS:
        steps.append(adapter_model.measure(dropout, seconds, memory, device))
        print(adapter_model.table_row(steps[-1]), flush=True)
    _write(
        output / "adapter.json",
        machine,
        device,
        layer=[row.as_dict() for row in rows],
        model=[row.as_dict() for row in steps],
    )
    return _judge((*adapter.verdicts(rows), *adapter_model.verdicts(steps)), device)


def _traffic(ranks: tuple[int, ...], output: Path) -> int:
    """In processes of their own: Triton decides when it is first imported whether kernels are interpreted, and its
    driver is replaced where they are emulated."""
    arguments = [str(output), *map(str, ranks)]
    emulated = subprocess.run([sys.executable, "-m", "bench.traffic.instructions", *arguments], check=False).returncode
    if emulated not in (0, 1) or not (output / "instructions.json").exists():
        return emulated
    command = [sys.executable, "-m", "bench.traffic", *arguments]
    interpreted = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    return max(emulated, interpreted)


def _host(output: Path, seconds: float) -> int:
    """In a process of its own: Triton's driver is replaced there, and the operators of the CPU."""
    command = [sys.executable, "-m", "bench.host", str(output), "--seconds", str(seconds)]
    return subprocess.run(command, check=False).returncode


def _distributed(ranks: tuple[int, ...], output: Path, seconds: float) -> int:
    """In a process of its own, which starts others."""
    command = [sys.executable, "-m", "bench.distributed", str(output), *map(str, ranks), "--seconds", str(seconds)]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Print the tables, write JSON and plots; 1 where a promise was missed."""
    if sys.argv[1:2] == ["gpu"]:  # which has options of its own
        from bench.gpu.run import main as gpu

        return gpu(sys.argv[2:])
    if sys.argv[1:2] == ["accuracy"]:
        from bench.accuracy.command import main as accuracy

        return accuracy(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("all", "polar", "step", "adapter", "traffic", "host", "distributed", "gpu", "accuracy"),
        default="all",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:INDEX (traffic is counted on the CPU)")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of the JSON and the plots")
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, help="default: all; of traffic 16 and 64")
    parser.add_argument(
        "--seconds", type=float, help="about how long a row is timed (default: 2.5 polar, 8 step and adapter)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of a step (a minute)")
    parser.add_argument("--full", action="store_true", help="every case of the adapter, which takes an hour and more")
    arguments = parser.parse_args()

    if arguments.what == "traffic":
        return _traffic(tuple(arguments.ranks or (16, 64)), arguments.output)
    if arguments.what == "host":
        return _host(arguments.output, arguments.seconds or 8.0)
    if arguments.what == "distributed":
        return _distributed(tuple(arguments.ranks or (16, 64)), arguments.output, arguments.seconds or 8.0)
    try:
        device = named(arguments.device)
        backends = served(device)
    except DeviceUnavailableError as error:
        parser.error(str(error))
    keep_memory()
    machine = measure_machine(device)
    print(
        f"torch {torch.__version__}, {machine} (measured here); {backends}. "
        "Medians of interleaved runs, ratios of the same round."
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    ranks, every = tuple(arguments.ranks or RANKS), True
    memory, seconds, common = not arguments.no_memory, arguments.seconds, (machine, arguments.output, device)
    if arguments.what in ("all", "polar"):
        every &= _polar(ranks, seconds or 2.5, *common)
    if arguments.what in ("all", "step"):
        every &= _step(ranks, seconds or 8.0, *common, memory)
    if arguments.what in ("all", "adapter"):
        every &= _adapter(arguments.full, seconds or 8.0, *common, memory)
    print(f"the machine at the end: {measure_machine(device)}")
    return int(not every)


if __name__ == "__main__":
    sys.exit(main())

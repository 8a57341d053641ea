"""The machine, its software, and what it reaches at best: the ceilings that every other figure is held against."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from bench.common.device import clock_of, tf32_allowed
from bench.common.timing import interleaved_samples
from bench.gpu.setting import Setting, attempt

ROOT = Path(__file__).parents[3]
NVIDIA_SMI = (
    *("name", "driver_version", "memory.total", "power.limit", "power.max_limit", "clocks.max.sm", "clocks.max.memory"),
    *("clocks.sm", "temperature.gpu", "ecc.mode.current", "mig.mode.current", "persistence_mode", "compute_mode"),
)
SIZE, COPIED = 8192, 2**28  # of a product's sides, and bytes of a copy: far out of cache
ROUNDS = 8
OWN = ("STELLA_KERNELS_AUTOTUNE", "STELLA_KERNELS_CACHE")  # set by the run itself, stage by stage


def run(setting: Setting) -> None:
    """Facts, then ceilings."""
    for title, ask in (("software", _software), ("checkout", _checkout), ("processor", _processor)):
        if (found := attempt(setting, title, ask)) is not None:
            _show(setting, title, found)
    if setting.rehearse:
        setting.missing("facts of a GPU: this is a rehearsal on the CPU")
    else:
        attempt(setting, "GPU", lambda: _gpu(setting))
    attempt(setting, "ceilings", lambda: _ceilings(setting))


def _show(setting: Setting, title: str, values: dict[str, object]) -> None:
    setting.record("facts", title=title, values=values)
    for name, value in values.items():
        print(f"{title:<10} {name:<24} {value}", flush=True)


def _version(package: str) -> str:
    """Without importing it, which takes whole model libraries seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _software() -> dict[str, object]:
    from stella_kernels import environment
    from stella_kernels.operators import backends
    from stella_kernels.operators.native.build_info import build_info
    from stella_kernels.version import __version__

    native, state = build_info(), backends.native_library.state
    return {
        "stella_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "ROCm of torch": torch.version.hip or "none",
        **{name: _version(name) for name in ("triton", "numpy", "peft", "transformers", "pytest", "matplotlib")},
        "native CPU library": f"{state}: the reference serves the CPU"
        if native is None
        else f"{state}, {native.compiler}",
        "backend of a GPU": backends.triton_why_not() or "Triton",
        "operating system": f"{platform.system()} {platform.release()}",
        "variables": ", ".join(
            f"{k}={os.environ[k]}" for k in environment.VARIABLES if k in os.environ and k not in OWN
        )
        or "none",
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _checkout() -> dict[str, object]:
    return {
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "not a checkout of git",
        "changed files": len(_output("git", "status", "--porcelain", "--untracked-files=no").splitlines()),
    }


def _processor() -> dict[str, object]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load before the run": round(load, 2),
    }


def _gpu(setting: Setting) -> None:
    device = setting.device
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, object] = {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "architecture": getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "L2 cache": f"{properties.L2_cache_size / 2**20:.1f} MiB",
        "GPUs": torch.cuda.device_count(),
        "free memory": f"{torch.cuda.mem_get_info(device)[0] / 2**30:.1f} GiB",
    }
    if shutil.which("nvidia-smi"):
        # By what torch calls this device, which CUDA_VISIBLE_DEVICES may have renumbered.
        which = str(getattr(properties, "uuid", "")) or "0"
        which = which if which == "0" or which.startswith("GPU-") else f"GPU-{which}"
        answer = _output("nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", "-i", which)
        found |= dict(zip((f"nvidia-smi {key}" for key in NVIDIA_SMI), answer.split(", "), strict=False))
        others = _output("nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader", "-i", which).splitlines()
        found["processes on it"] = len(others)
        if len(others) > 1:
            setting.note(f"{len(others)} processes are on this GPU: its times are shared with others")
    _show(setting, "GPU", found)


def _ceilings(setting: Setting) -> None:
    """The best of some rounds of each, which is what a ceiling is; of a launch the median."""
    device = setting.device
    size, copied = (64, 2**12) if setting.rehearse else (SIZE, COPIED)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=device)
    candidates: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "read": source.sum}
    products = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, dtype in products.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, name: str = name) -> torch.Tensor:
            if name != "tf32":
                return a @ b
            with tf32_allowed():
                return a @ b

        candidates[f"product, {name}"] = multiply
    samples = interleaved_samples(candidates, 0.0, min_rounds=ROUNDS, device=device)
    for name, taken in samples.items():
        work, unit = (2.0 * size**3, "flop/s") if name.startswith("product") else (float(copied), "byte/s")
        work *= 2.0 if name == "copy" else 1.0  # read and written
        setting.record("ceiling", name=name, rate=work / min(taken), unit=unit, seconds=min(taken), samples=taken)
        print(f"{name:<20} {work / min(taken) / 1e9:12.1f} G{unit}", flush=True)
    clock = clock_of(device)
    launch = statistics.median(clock(lambda: one.add_(1.0)) for _ in range(20))
    setting.record("ceiling", name="one small launch", rate=1.0 / launch, unit="launches/s", seconds=launch)
    print(f"one small launch     {1e6 * launch:12.1f} us", flush=True)

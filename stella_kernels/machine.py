"""What ``python -m stella_kernels info`` tells: this machine, what serves on it and why, what would make it faster."""

from __future__ import annotations

import importlib
import json
import os
import platform
from pathlib import Path

import torch

from . import environment
from .operators import backends, planned
from .operators.native.build_info import build_info
from .operators.signatures import OPERATORS
from .version import __version__


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except (ImportError, AttributeError) as error:  # of a folder by that name
        return f"not available: {error}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def describe() -> dict[str, object]:
    """What ``info`` prints, as plain values."""
    native = build_info()
    gpus = _gpus()
    build: dict[str, object] | None = None
    if native is not None:
        build = {
            "compiler": native.compiler,
            "torch at build": native.torch_at_build,
            "instruction sets built": native.instruction_sets(),
        }
        try:
            build["instruction set chosen"] = native.instruction_set()
            build["vector bytes"] = native.vector_bytes()
        except ValueError as error:  # one is asked for that is not here, and nothing else has said so
            build["instruction set chosen"] = f"none: {error}"
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return {
        "stella_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{_processor()} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "native library": backends.native_library.state,
        "native build": build,
        "triton": _triton(),
        "gpus": gpus,
        "environment": {name: os.environ[name] for name in environment.VARIABLES if os.environ.get(name)},
        "backends": {
            b.name: "available" if b.available else f"not available: {b.why_not}" for b in backends.backends()
        },
        "operators": {
            device: {
                operator: {
                    "backend": backends.serving(operator, device),
                    "why not": backends.passed_over(operator, device),
                }
                for operator in OPERATORS
            }
            for device in devices
        },
        "next": next_step(),
    }


def next_step() -> str:
    """What to do to make this machine faster, in the order of what it gains; that there is nothing, where there is."""
    steps = []
    library, native = backends.native_library, build_info()
    if library.state != "serves":
        steps.append(f"{library.what_to_do}: the reference serves the CPU, for the native library is {library.state}")
    elif native is not None and native.instruction_set() != (best := native.instruction_sets_here()[0]):
        steps.append(f"unset STELLA_KERNELS_ISA: this processor has {best}, and {native.instruction_set()} serves")
    if torch.cuda.is_available():
        if reason := backends.triton_why_not():
            steps.append(f"for the GPU: {reason}")
        elif environment.value("STELLA_KERNELS_AUTOTUNE") == "0":
            steps.append("unset STELLA_KERNELS_AUTOTUNE: no tile of the adapter's GPU kernels is measured")
        elif torch.version.hip is None and planned.launcher() is None:
            steps.append(
                f"build the launcher of GPU kernels for this Python {platform.python_version()}, with a C++ compiler, "
                "cmake, ninja and pybind11: STELLA_KERNELS_BUILD=cpu pip install --no-build-isolation ."
            )
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" in os.environ and 2 * torch.get_num_threads() < processors:
        steps.append(f"unset OMP_NUM_THREADS: {torch.get_num_threads()} of {processors} processors work")
    served = "on the CPU and on the GPU" if torch.cuda.is_available() else "on the CPU"
    return "; then ".join(steps) or f"nothing: native kernels serve {served}"


def info(as_json: bool) -> int:
    """Print what this machine has and which backend serves which operator."""
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    for key in ("stella_kernels", "python", "torch", "processor", "threads", "triton"):
        print(f"{key:<16}{facts[key]}")
    gpus, build, variables = facts["gpus"], facts["native build"], facts["environment"]
    assert isinstance(gpus, list)
    print(f"{'gpus':<16}{', '.join(gpus) or 'none that torch can use'}")
    print(f"{'native library':<16}{facts['native library']}")
    for key, value in build.items() if isinstance(build, dict) else ():
        print(f"  {key:<24}{', '.join(value) if isinstance(value, list) else value}")
    print("environment")
    assert isinstance(variables, dict)
    for key, variable in environment.VARIABLES.items():
        found = variables.get(key, f"not set ({variable.default})" if variable.default else "not set")
        choices = f" ({' | '.join(variable.choices)})" if variable.choices else ""
        print(f"  {key:<34}{found:<16}  {variable.meaning}{choices}")
    for title in ("backends", "operators"):
        print(title)
        section = facts[title]
        assert isinstance(section, dict)
        for key, value in section.items():
            if title == "backends":
                print(f"  {key:<24}{value}")
                continue
            for operator, served in value.items():
                print(f"  {key} {operator:<24}{served['backend']}")
                for other, reason in served["why not"].items():
                    print(f"      not {other}: {reason}")
    print(f"next: {facts['next']}")
    return 0

"""compute-sanitizer, NVIDIA's checker of accesses, over small odd cases: memcheck, then racecheck where time is left."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.setting import Setting

TOOLS = ("memcheck", "racecheck")
FOUND = 99  # the exit status that the tool is told to end with where it found something


def run(setting: Setting) -> None:
    """A verdict for each tool that came to its end."""
    program = None if setting.rehearse else found()
    if program is None and not setting.rehearse:
        setting.missing("compute-sanitizer is neither on PATH nor in a CUDA toolkit's folder")
        return
    for tool in TOOLS:
        if setting.left < 15:
            setting.missing(f"{tool}: no time left")
            continue
        if setting.rehearse:
            setting.note(f"{tool}: rehearsed without the tool, which knows GPUs alone")
        _check(setting, tool, [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
               if program else [])  # fmt: skip
        if setting.rehearse:
            break


def found() -> str | None:
    """Where the program is."""
    toolkits = (os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(str(Path(toolkit) / "bin") for toolkit in toolkits if toolkit)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _check(setting: Setting, tool: str, prefix: list[str]) -> None:
    command = [*prefix, sys.executable, "-m", "bench.gpu.odd_cases", *(["--rehearse"] if setting.rehearse else [])]
    # each tensor in memory of its own, so that what lies behind it belongs to nobody
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "--seconds", f"{setting.left / (1 if tool == TOOLS[-1] else 2):.0f}"],
            env=environment, capture_output=True, text=True, errors="replace", timeout=setting.left, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        print(out[-4000:], flush=True)
        setting.missing(f"{tool}: not done within its time; {_cases(out)} cases ran")
        return
    print((done.stdout + done.stderr)[-8000:], flush=True)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
    setting.record("sanitizer", tool=tool, summary=summary[-1] if summary else "", status=done.returncode)
    what = f"{tool}: {_cases(done.stdout)} odd cases, {summary[-1] if summary else f'exit status {done.returncode}'}"
    setting.verdict(done.returncode == 0, what)


def _cases(printed: str) -> int:
    return len(re.findall(r"^case ", printed, re.M))



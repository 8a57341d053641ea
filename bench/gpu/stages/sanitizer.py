"""compute-sanitizer, NVIDIA's checker of accesses, over small odd cases: memcheck, then racecheck if time is left."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
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
    command += ["--seconds", f"{setting.left / (1 if tool == TOOLS[-1] else 2):.0f}"]
    # To a file: of a pipe, what a killed tool has started would be waited for.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(max(5.0, setting.left))
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        output.seek(0)
        printed = output.read()
    print(printed[-8000:], flush=True)
    cases = len(re.findall(r"^case ", printed, re.M))
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", printed)
    setting.record("sanitizer", tool=tool, summary=summary[-1] if summary else "", status=status, cases=cases)
    if status is None:
        setting.missing(f"{tool}: not done within its time; {cases} odd cases had run, of which it says nothing")
        return
    setting.verdict(
        status == 0 and cases > 0,
        f"{tool}: {cases} odd cases, {summary[-1] if summary else f'exit status {status}'}",
    )

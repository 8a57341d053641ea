"""``python -m bench gpu``: stages that hang, break off or find wrong results, and what the report makes of them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu import run, stage
from bench.gpu.report.markdown import page
from bench.gpu.report.measured import NONE, table
from bench.gpu.setting import Setting, read_records
from bench.gpu.stage import BROKEN, FAILED, KILLED, NOT_RUN, PASSED, STAGES, Outcome, Stage
from bench.gpu.stages import facts, verify
from bench.gpu.stages.host import busy_and_gaps
from stella_kernels.verification.case_table import Case
from stella_kernels.verification.judge import Result

ROOT = Path(__file__).parents[2]

# A stage's process that writes a record and then does what its name says; `child` is a process of its own that stays.
PROGRAM = """
import subprocess, sys, time
from pathlib import Path
from bench.gpu.setting import Setting
setting = Setting(sys.argv[1], Path(sys.argv[2]), True, 60.0)
setting.verdict(sys.argv[1] != "wrong", "said before")
if sys.argv[1] in ("hangs", "leaves"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(sys.argv[2], "child").write_text(str(child.pid))
if sys.argv[1] == "hangs":
    time.sleep(600)
if sys.argv[1] == "breaks":
    print("in " + str(Path(sys.argv[2]).home()), flush=True)
    raise RuntimeError("broken")
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process of every stage is :data:`PROGRAM`."""
    popen = subprocess.Popen

    def started(command: list[str], **named: Any) -> subprocess.Popen[str]:
        assert command[1:3] == ["-m", "bench.gpu"]
        return popen([sys.executable, "-c", PROGRAM, command[3], command[4]], **named)

    monkeypatch.setattr(stage.subprocess, "Popen", started)
    (tmp_path / "records").mkdir()


def ran(name: str, folder: Path, limit: float = 60.0) -> Outcome:
    with (folder / "log.txt").open("w") as log:
        return stage.run_stage(Stage(name, "facts", "a test", 1), folder, True, limit, log)


def gone(process: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        state = re.search(r"^State:\s+(\w)", Path(f"/proc/{process}/status").read_text(), re.M)
        if state is not None and state[1] == "Z":  # nobody's child here reaps it
            return True
        time.sleep(0.1)
    return False


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize(("name", "status"), [("right", PASSED), ("wrong", FAILED), ("breaks", BROKEN)])
def test_how_a_stage_ended(name: str, status: str, tmp_path: Path) -> None:
    outcome = ran(name, tmp_path)
    assert outcome.status == status
    assert [record["text"] for record in outcome.of("verdict")] == ["said before"]
    assert any("RuntimeError: broken" in line for line in outcome.tail) == (status == BROKEN)
    assert str(Path.home()) not in (tmp_path / "log.txt").read_text()


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize(("name", "status"), [("hangs", KILLED), ("leaves", PASSED)])
def test_what_a_stage_has_started_ends_with_it(name: str, status: str, tmp_path: Path) -> None:
    outcome = ran(name, tmp_path, limit=15.0)
    assert outcome.status == status
    assert outcome.of("verdict")
    assert gone(int((tmp_path / "child").read_text()))


def test_limits_add_up_to_what_there_is() -> None:
    left = 480.0
    for index in range(len(STAGES)):
        left -= stage.limit_of(STAGES[index], left, STAGES[index:])
    assert abs(left) < 1e-6
    assert stage.limit_of(STAGES[-1], 100.0, STAGES[-1:]) == 100.0  # what others have not taken


def outcome_of(name: str, status: str = PASSED, *records: dict[str, Any]) -> Outcome:
    return Outcome(stage.named(name), status, 1.0, 2.0, list(records), ["the | last <line>"])


def case(operator: str, passed: bool) -> dict[str, Any]:
    return {"kind": "case", "operator": operator, "passed": passed, "name": f"{operator}-x", "dtype": "float32",
            "what": "value", "error": 1e-7 if passed else "nan", "tolerance": 1e-6}  # fmt: skip


def test_nothing_is_timed_of_an_operator_that_is_wrong() -> None:
    polar, step = stage.named("polar"), stage.named("step")
    right = outcome_of("verify", PASSED, *(case(name, True) for name in ("polar", *step.needs)))
    assert run.unfit(polar, [right]) == ""
    assert run.unfit(step, [right]) == ""
    others = [case(name, True) for name in step.needs]
    wrong = outcome_of("verify", FAILED, case("polar", True), case("polar", False), *others)
    assert run.unfit(polar, [wrong]) == "results wrong (polar)"
    assert run.unfit(step, [wrong]) == ""
    assert "not verified" in run.unfit(step, [outcome_of("verify", KILLED, case("polar", True))])
    assert "not verified" in run.unfit(polar, [outcome_of("verify", BROKEN)])


def report_of(folder: Path, rehearsed: bool, *outcomes: Outcome) -> dict[str, Any]:
    head = {"format": 1, "chip": "some-gpu", "rehearsed": rehearsed, "date": "2000-01-02", "minutes": 8.0,
            "complete": False, "seconds": 3.0}  # fmt: skip
    run.write(folder, head, list(outcomes), STAGES[-1:])
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


FACTS = (
    {"kind": "facts", "title": "software", "values": {"torch": "2.99", "triton": "3.99", "stella_kernels": "0"}},
    {"kind": "facts", "title": "GPU", "values": {"name": "Some GPU", "nvidia-smi driver_version": "999.1"}},
    {"kind": "ceiling", "name": "copy", "rate": 2e12, "unit": "byte/s", "seconds": 1e-3},
)


def test_report_of_a_run_that_went_wrong(tmp_path: Path) -> None:
    missing = {"kind": "missing", "text": "not timed: results wrong (polar)"}
    report_of(
        tmp_path,
        False,
        outcome_of("facts", PASSED, *FACTS),
        outcome_of("verify", FAILED, case("polar", False), {"kind": "verdict", "met": False, "text": "polar: 0 of 1"}),
        outcome_of("model", KILLED),
        outcome_of("polar", NOT_RUN, missing),
    )
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# stella_kernels on Some GPU\n")
    assert "Rehearsed" not in text
    for told in ("driver 999.1", "Did not pass: verify, model", "not run: polar, rest", "had not come to its end",
                 "**fails**: polar: 0 of 1", "KILLED at its limit", "not timed: results wrong (polar)",
                 "the | last <line>", "rest: the run ended before it", "`bench/measured/some-gpu/`"):  # fmt: skip
        assert told in text, told


def test_every_page_of_a_rehearsal_says_so(tmp_path: Path) -> None:
    report_of(tmp_path, True, outcome_of("facts", PASSED, *FACTS), outcome_of("verify", PASSED, case("polar", True)))
    text = (tmp_path / "report.md").read_text()
    sections = [part for part in text.split("\n## ")[1:] if not part.startswith(("Not run", "What to do"))]
    assert len(sections) >= 3
    assert all("not measured" in part for part in sections)


def test_table_of_the_documentation(tmp_path: Path) -> None:
    for name, rehearsed in (("some-gpu", False), ("rehearsal", True)):
        (tmp_path / name).mkdir()
        report_of(tmp_path / name, rehearsed, outcome_of("facts", PASSED, *FACTS),
                  outcome_of("verify", PASSED, case("polar", True)))  # fmt: skip
    lines = table(tmp_path).splitlines()
    assert len(lines) == 3
    assert "Some GPU (`bench/measured/some-gpu`)" in lines[2]
    assert "1 of 1 cases | 2000 | not run | not run | not run" in lines[2]
    assert table(tmp_path / "nowhere") == NONE


def test_documentation_shows_what_was_measured() -> None:
    text = (ROOT / "docs" / "gpus.md").read_text()
    found = re.search(r"<!-- measured -->\n(.*?)<!-- /measured -->", text, re.S)
    assert found is not None
    assert found[1].strip() == table(run.MEASURED).strip(), "put the output of python -m bench gpu --table there"


def test_records_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    Setting("facts", tmp_path, True, 1.0).record("note", text="whole", value=float("nan"))
    with (tmp_path / "records" / "facts.jsonl").open("a") as file:
        file.write('{"kind": "not')
    assert read_records(tmp_path, "facts") == [{"kind": "note", "text": "whole", "value": "nan"}]


def test_gaps_between_kernels() -> None:
    busy, gaps = busy_and_gaps([(0.0, 2.0), (1.0, 3.0), (1.5, 2.0), (7.0, 8.0)])
    assert (busy, gaps) == (4.0, [4.0])


def test_facts_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver's program that answers as it does, and another process on the GPU."""
    tool = tmp_path / "nvidia-smi"
    answer = ", ".join(f"<{key}>" for key in facts.NVIDIA_SMI)
    tool.write_text(f"#!/bin/sh\ncase $1 in *compute-apps*) echo 11; echo 12;; *) echo '{answer}';; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    properties = SimpleNamespace(
        name="Some GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**36, L2_cache_size=2**25,
        uuid="00000000-0000-0000-0000-000000000000",
    )  # fmt: skip
    monkeypatch.setattr(facts.torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(facts.torch.cuda, "mem_get_info", lambda device: (2**35, 2**36))
    monkeypatch.setattr(Setting, "device", facts.torch.device("cpu"))
    (tmp_path / "records").mkdir()
    facts._gpu(Setting("facts", tmp_path, False, 60.0))
    found, note = {}, ""
    for record in read_records(tmp_path, "facts"):
        found |= record.get("values", {})
        note += record.get("text", "")
    assert found["architecture"] == "sm_90"
    assert found["nvidia-smi driver_version"] == "<driver_version>"
    assert "2 processes are on this GPU" in note


def test_a_device_that_is_lost_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is replaced by one that goes on behind it."""
    some = [Case("polar", "gaussian", ((n, 1),)) for n in (3, 4, 5)]

    def judged(case: Case, backend: str, implementation: object) -> Result:
        lost = case is some[1]
        what = "raised RuntimeError: CUDA error: an illegal memory access was encountered" if lost else "value"
        return Result(case, backend, what, math.inf if lost else 0.0, 0.0)

    def replaced(program: str, command: list[str]) -> None:
        raise SystemExit(" ".join(command[1:]))

    monkeypatch.setattr(verify, "chosen_cases", lambda rehearse, stage: some)
    monkeypatch.setattr(verify, "implementation_of", lambda setting: {})
    monkeypatch.setattr(verify, "check", judged)
    monkeypatch.setattr(verify.os, "execv", replaced)
    (tmp_path / "records").mkdir()
    with pytest.raises(SystemExit, match=r"-m bench.gpu verify .* --start 2$"):
        verify.run(Setting("verify", tmp_path, False, 60.0))
    verify.run(Setting("verify", tmp_path, False, 60.0, start=2))
    found = read_records(tmp_path, "verify")
    assert [record["passed"] for record in found if record["kind"] == "case"] == [True, False, True]
    (verdict,) = [record for record in found if record["kind"] == "verdict"]
    assert not verdict["met"]
    assert "2 of 3" in verdict["text"]


def test_without_a_gpu_the_command_says_what_to_do() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "bench", "gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--rehearse" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_libraries_stages_say_what_is_missing(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("peft", "transformers", "matplotlib", "pytest"):
        (packages / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--rehearse", "--only", "adapter", "model", "tests", "--output",
         str(tmp_path / "out")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(packages)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "tests/gpu: pytest does not import" in text
    assert "the model is one of plain torch: transformers does not import" in text
    assert "three lines of torch" in text
    assert not (tmp_path / "out" / "report.png").exists()


@pytest.mark.whole
def test_rehearsal(tmp_path: Path) -> None:
    """Every stage, as ``make gpu REHEARSE=1`` runs them."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--rehearse", "--minutes", "20", "--output", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rehearsed"]
    assert report["complete"]
    assert {one["stage"]: one["status"] for one in report["stages"]} == {one.name: PASSED for one in STAGES}
    kinds = {record["kind"] for one in report["stages"] for record in one["records"]}
    assert kinds >= {"facts", "ceiling", "case", "verdict", "layer", "step", "retract", "polar", "model", "host",
                     "gaps", "test", "sanitizer", "count"}  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "no GPU (a rehearsal)" in text
    assert text == page(report, (tmp_path / "report.png").exists())
    assert str(Path.home()) not in (tmp_path / "log.txt").read_text()


def test_a_run_that_is_ended_leaves_its_report(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "gpu", "--rehearse", "--only", "facts", "verify", "--output", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("== verify"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["status"] for one in report["stages"]] == [PASSED, "INTERRUPTED"]
    assert "INTERRUPTED" in (tmp_path / "report.md").read_text()

"""``pytest -m gpu`` in this process, each result written as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.gpu.setting import Setting, importable

ROOT = Path(__file__).parents[3]


class _Writer:
    """A plugin of pytest."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = str(report.longrepr).splitlines()[-1][:300] if report.longrepr is not None else ""
            text = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else text  # why it was skipped
            self._setting.record("test", name=report.nodeid, outcome=report.outcome, text=text)

    def pytest_runtest_logfinish(self) -> None:
        if self._setting.left < 0:
            import pytest

            pytest.exit("no time left", returncode=0)


def run(setting: Setting) -> None:
    """A verdict for all that were run."""
    if why_not := importable("pytest"):
        setting.missing(f"tests/gpu: {why_not}")
        return
    import pytest

    from bench.gpu.setting import read_records

    status = pytest.main(
        [
            *("-m", "gpu", "-q", "-p", "no:cacheprovider", "--color=no", "--tb=short", str(ROOT / "tests" / "gpu")),
            # what an earlier stage has looked at; an interpreter would take as long again
            *(("-k", "not test_feature") if setting.rehearse else ()),
        ],
        plugins=[_Writer(setting)],
    )
    outcomes = [record for record in read_records(setting.folder, setting.stage) if record["kind"] == "test"]
    count = {kind: sum(one["outcome"] == kind for one in outcomes) for kind in ("passed", "failed", "skipped")}
    text = ", ".join(f"{number} {kind}" for kind, number in count.items() if number) or "none ran"
    reasons = sorted({one["text"].removeprefix("Skipped: ") for one in outcomes if one["outcome"] == "skipped"})
    text += f" ({'; '.join(reasons)})" if reasons else ""
    setting.verdict(not count["failed"] and count["passed"] > 0 and status in (0, 2), f"tests/gpu: {text}")
    if setting.left < 0:
        setting.missing("the rest of tests/gpu: no time left")

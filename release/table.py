"""The table of docs/install.md, as the log of ``make test-wheel`` has it."""

from __future__ import annotations

import json
import re
from typing import Any

from .build import ROOT
from .check import LOG

PAGE = ROOT / "docs" / "install.md"
_BEGIN, _END = "<!-- made by python -m release table -->", "<!-- end -->"


def table(log: dict[str, Any]) -> str:
    """A line for each Python, a column for each torch of the wheel with the library; a line for the one without."""
    native = [row for row in log["rows"] if not row["wheel"].endswith("-any.whl")]
    torches = list(dict.fromkeys(row["torch"] for row in native if "not to be had" not in row))
    torches.sort(key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
    lines = [f"| Python | {' | '.join(f'torch {torch}' for torch in torches)} |", "|---" * (len(torches) + 1) + "|"]
    for python in dict.fromkeys(row["python"] for row in native):
        cells = {row["torch"]: _cell(row) for row in native if row["python"] == python}
        other = cells.get("newest", "not run")  # that name stays where no torch was found
        lines.append(f"| {python} | {' | '.join(cells.get(torch, other) for torch in torches)} |")
    lines.append("")
    served = "served with its CPU kernels where it was verified" if served_somewhere(log) else "**served nowhere**"
    lines.append(f"On {log['system']}, by the steps of `make test-wheel`. `{native[0]['wheel']}` {served}.")
    for row in log["rows"]:
        if row not in native:
            lines.append(f"`{row['wheel']}`, on Python {row['python']} and torch {row['torch']}: {_cell(row)}.")
    return "\n".join(lines)


def served_somewhere(log: dict[str, Any]) -> bool:
    """Whether the wheel with the library was verified on any pair: else nothing was shown."""
    return any("verify" in row and "failed" not in row for row in log["rows"] if not row["wheel"].endswith("-any.whl"))


def _cell(row: dict[str, Any]) -> str:
    if "failed" in row or "not to be had" in row:
        return "**failed**" if "failed" in row else "not to be had"
    (verified,) = re.findall(r"^(\d+ of \d+) cases", row["verify"])
    (tested,) = re.findall(r"(\d+) passed", row["tests"])
    return f"verify {verified}, {tested} tests"


def logged() -> dict[str, Any]:
    """What the last run of ``check`` has written."""
    found: dict[str, Any] = json.loads(LOG.read_text())
    return found


def shown() -> str:
    """The table that the page has."""
    return PAGE.read_text().split(_BEGIN)[1].split(_END)[0].strip()


def write() -> None:
    """The page, with the table of the log."""
    before, rest = PAGE.read_text().split(_BEGIN)
    PAGE.write_text(f"{before}{_BEGIN}\n\n{table(logged())}\n\n{_END}{rest.split(_END)[1]}")

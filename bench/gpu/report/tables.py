"""Tables of markdown, and numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def cell(text: object) -> str:
    """Text that breaks no table and is not taken for markup."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def rows(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table, to the right the columns whose title ends in a colon."""
    marks = ["--:" if title.endswith(":") else "---" for title in header]
    body = ["| " + " | ".join(map(cell, line)) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(t.rstrip(":") for t in header) + " |", "|" + "|".join(marks) + "|", *body, ""])


def ms(seconds: float) -> str:
    """Milliseconds of three digits or so."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def us(seconds: float) -> str:
    """Whole microseconds."""
    return f"{1e6 * seconds:.0f}"


def times(ratio: float) -> str:
    """A ratio."""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2f}"


def rate(moved: float, seconds: float, copy: float) -> tuple[str, str]:
    """GB/s, and as a part of what a copy reached beside it; dashes where the time is lost in noise."""
    if seconds <= 0.0:
        return "in the noise", "–"
    return f"{moved / seconds / 1e9:.3g}", f"{moved / seconds / copy:.0%}"

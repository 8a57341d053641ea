"""Every environment variable of the package, in one table: what it means, what it may be, and its value in force.

Nothing is imported here but Python's own library, so that any module may ask, and setup.py before there is a package.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

PREFIX = "STELLA_KERNELS_"
_LIKE = r"STELLA_?KERNELS?_"  # and what is meant to be that


@dataclass(frozen=True)
class Variable:
    """A variable: its meaning, its default, and what it may be in any case of letters (() for any text at all)."""

    meaning: str
    default: str = ""
    choices: tuple[str, ...] = ()


VARIABLES: dict[str, Variable] = {
    "STELLA_KERNELS_BACKEND": Variable(
        "which backend serves; cpu and triton are errors where they cannot",
        "auto",
        ("auto", "reference", "cpu", "triton"),
    ),
    "STELLA_KERNELS_ISA": Variable(
        "instruction set of the CPU kernels; without it the best that this processor has",
        choices=("avx512", "avx2", "baseline"),
    ),
    "STELLA_KERNELS_AUTOTUNE": Variable("whether Triton's kernels are timed at first use", "1", ("0", "1")),
    "STELLA_KERNELS_CACHE": Variable("folder where the choices of autotuning are kept"),
    "STELLA_KERNELS_GRADIENT_PRECISION": Variable(
        "how Triton multiplies float32 for the Riemannian gradient", choices=("tf32x3", "ieee", "tf32")
    ),
    "STELLA_KERNELS_BUILD": Variable(
        "what setup.py builds; of no effect on an installed package", "auto", ("auto", "none", "cpu")
    ),
}


def one_of(choices: Sequence[str]) -> str:
    """The choices as the messages list them."""
    return f"one of {', '.join(map(repr, choices))}"


def value(name: str) -> str:
    """The value in force: the default where ``name`` is not set or empty, in lower case where it is a choice.

    Raises ``ValueError`` for a value that is none of the choices.
    """
    variable = VARIABLES[name]
    found = os.environ.get(name) or variable.default
    if not variable.choices or not found:
        return found
    if found.lower() not in variable.choices:
        near = difflib.get_close_matches(found.lower(), variable.choices, 1)
        meant = f"did you mean {near[0]!r}? Else unset it" if near else "correct it, or unset it"
        raise ValueError(f"{name}: found {found!r}, wanted {one_of(variable.choices)}; {meant}.")
    return found.lower()


def check() -> None:
    """Raise ``ValueError`` for a variable of the prefix that there is not, and for a value that is no choice."""
    for name in sorted(os.environ):
        if not os.environ[name] or not re.match(_LIKE, name.upper()) or name in VARIABLES:
            continue  # empty is not set, here too
        ends = [known.removeprefix(PREFIX) for known in VARIABLES]
        near = difflib.get_close_matches(re.sub(_LIKE, "", name.upper()), ends, 1)
        meant = f"did you mean {PREFIX}{near[0]}? Else unset it" if near else "unset it"
        raise ValueError(f"{name}: found set, but there is no such variable, wanted {', '.join(VARIABLES)}; {meant}.")
    for name in VARIABLES:
        value(name)

"""Argument checks shared by the public functions, and the package's own error types.

Every message names the argument, says what was found and what was wanted, and says what to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

METHODS = ("auto", "newton_schulz", "svd")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NonFiniteError(RuntimeError):
    """A factor or a gradient holds NaN or an infinity. ``names`` lists the factors at fault."""

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class OffManifoldError(RuntimeError):
    """A factor was found off its Stiefel manifold: something else moved it. ``names`` lists the factors at fault."""

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve; the message says why and what to do."""


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        wanted = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{argument}: found {value!r}, wanted one of {wanted}.")


def check_float_tensor(argument: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor of a floating-point dtype the kernels take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: found {type(value).__name__}, wanted a torch.Tensor.")
    if value.dtype.is_complex:
        raise TypeError(
            f"{argument}: found dtype {value.dtype}, wanted float32, float64, bfloat16 or float16; complex factors "
            "are not supported."
        )
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{argument}: found dtype {value.dtype}, wanted float32, float64, bfloat16 or float16; "
            f"convert it first, for example with {argument}.float()."
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{argument}: found layout {value.layout}, wanted a dense tensor; convert it first, with "
            f"{argument}.to_dense()."
        )


def check_whole_number(argument: str, value: object, smallest: int = 1) -> None:
    """Raise ``TypeError`` unless ``value`` is an int (a bool is none), ``ValueError`` unless it is large enough."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: found {value!r}, wanted a whole number, {smallest} or more.")
    if value < smallest:
        raise ValueError(f"{argument}: found {value!r}, wanted a whole number, {smallest} or more.")


def check_finite_number(argument: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a number, ``ValueError`` unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: found {value!r}, wanted a number.")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: found {value!r}, wanted a finite number.")


def check_tall(argument: str, value: Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` is (..., n, r) with n >= r."""
    if value.dim() < 2:
        raise ValueError(f"{argument}: found shape {tuple(value.shape)}, wanted (..., n, r): at least two dimensions.")
    n, r = value.shape[-2:]
    if n < r:
        raise ValueError(
            f"{argument}: found shape {tuple(value.shape)}, wanted (..., n, r) with n >= r; "
            f"a factor stored transposed is passed as {argument}.mT (no copy is made)."
        )

"""Modules with StelLA factors, how factors are initialised, and how an optimizer finds the constrained ones."""

from .adapted import Term, adapted_output, is_untouched, start_term
from .factors import (
    HasStiefelFactors,
    OwnFactor,
    StiefelFactor,
    missing_factors_advice,
    orthonormality_tolerance,
    stiefel_factors,
)
from .linear import StellaLinear
from .masters import lost_masters, restore_masters
from .starts import INITS, init_factors

__all__ = [
    "INITS",
    "HasStiefelFactors",
    "OwnFactor",
    "StellaLinear",
    "StiefelFactor",
    "Term",
    "adapted_output",
    "init_factors",
    "is_untouched",
    "lost_masters",
    "missing_factors_advice",
    "orthonormality_tolerance",
    "restore_masters",
    "start_term",
    "stiefel_factors",
]

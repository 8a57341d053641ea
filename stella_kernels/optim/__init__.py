"""Optimizers for StelLA: hooks for any torch optimizer, and AdamW with the geometry fused.

The promise of both: after any step a constrained factor that moved is orthonormal to round-off, or the step that would
have trained it wrongly has raised an error that names factor, cause and cure (``guard.py``).
"""

from .adamw import StellaAdamW
from .attach import attach
from .attachment import Attachment
from .guard import retract

__all__ = ["Attachment", "StellaAdamW", "attach", "retract"]

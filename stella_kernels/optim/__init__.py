"""Riemannian optimization of Stiefel factors: AdamW with the whole step fused, or any torch optimizer with hooks."""

from .adamw import StellaAdamW
from .attach import Attachment, attach

__all__ = ["Attachment", "StellaAdamW", "attach"]

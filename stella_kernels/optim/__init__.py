"""Riemannian optimization of Stiefel factors with any torch optimizer."""

from .attach import Attachment, attach

__all__ = ["Attachment", "attach"]

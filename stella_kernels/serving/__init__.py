"""A StelLA adapter as what servers read, LoRA, and back: folders in, folders out, no base model, no PEFT.

``python -m stella_kernels export`` and ``import`` are these functions. A model in memory: ``stella_kernels.peft``.
"""

from .export import LoraReport
from .files import export_adapter, import_adapter

__all__ = ["LoraReport", "export_adapter", "import_adapter"]

"""StelLA adapters with the geometry for free. The public names, and nothing else."""

from . import nn, optim

__version__ = "0.1.0"

__all__ = ["__version__", "nn", "optim"]

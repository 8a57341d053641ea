"""The operators put before torch: ``torch.ops.stella_kernels``, with schema, reference and fake of each.

Importing this module compiles nothing. It loads the CPU library, where there is one (``backends.py``), which registers
itself; Triton's kernels are registered by ``triton_kernels/registration.py``.
"""

from __future__ import annotations

import torch

from .fakes import FAKES
from .fallback import REFERENCE
from .signatures import SIGNATURES, positional

library = torch.library.Library("stella_kernels", "DEF")

for _signature in SIGNATURES:
    library.define(_signature.schema())
    library.impl(_signature.name, REFERENCE[_signature.name], "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"stella_kernels::{_signature.name}", positional(_signature, FAKES[_signature]), lib=library
    )

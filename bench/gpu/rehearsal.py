"""A rehearsal: every stage on the CPU at toy sizes, with Triton's kernels interpreted, so that it is known to run.

Nothing of it is a measurement, and every page says so.
"""

from __future__ import annotations

import os

import torch

from bench.common import roofline, shapes, timing
from bench.common.shapes import ModelShapes

# Triton decides when it is imported whether it interprets; the native library would take the CPU's operators.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "STELLA_KERNELS_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
TOY = ModelShapes("toy", hidden=24, mlp=40, key_value=12)
TOY_MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": True,
}  # fmt: skip

_libraries: list[torch.library.Library] = []  # their registrations end with them


def interpreting() -> bool:
    """Whether this process is one in which Triton's kernels are to be interpreted for tensors of the CPU."""
    from stella_kernels.triton_kernels import registration

    return os.environ.get("STELLA_KERNELS_BACKEND") == "reference" and registration.interpreted()


def serve_interpreted() -> bool:
    """Have Triton's kernels, interpreted, serve the operators of CPU tensors; returns whether Triton is there for it.

    Under :data:`ENVIRONMENT` alone, in which nothing native has taken them.
    """
    if not interpreting():
        return False
    if not _libraries:
        from stella_kernels.triton_kernels import registration

        library = torch.library.Library("stella_kernels", "IMPL", "CPU")
        for name, call in registration.operators().items():
            library.impl(name, call)
        _libraries.append(library)
    return True


def shrink() -> None:
    """Make the benchmarks' sizes toys, in this process: their tables are written for whole models."""
    from bench.stiefel import model, retract, step, step_memory

    for module in (model, roofline, step, step_memory):
        module.LLAMA_3_8B = TOY
    shapes.MAX_LAYERS_RANK = 8
    for table in (retract, step):
        table.LAYERS = {4: 1}
    timing._SIZE = {"cpu": 64, "cuda": 64}
    timing._COPIED = {"cpu": 1000, "cuda": 1000}
    timing.MAX_ROUNDS = 3

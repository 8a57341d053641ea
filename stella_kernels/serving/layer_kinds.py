"""How LoRA stores the two matrices of a layer: of a linear one, of an embedding, of a convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .adapter_files import PREFIX

FIELD = "stella_layer_kinds"  # of the configuration: the kinds by name, where they are not linear

# 'embedding'; the sizes (in, kh, kw) of a convolution's kernel; in words, one that PEFT's LoRA does not compute; None:
# a linear layer
Kind = str | Sequence[int] | None


def lora_tensors(name: str, A: Tensor, B: Tensor, kind: Kind) -> dict[str, Tensor]:
    """A (r, n) and B (m, r) under the names and in the shapes that PEFT's LoRA of such a layer has.

    An embedding's stay as they are; a convolution's are kernels, (r, in, kh, kw) and (m, r, 1, 1).

    Raises:
        ValueError: PEFT's LoRA computes something else for such a layer.
    """
    if kind == "embedding":
        return {f"{PREFIX}{name}.lora_embedding_A": A, f"{PREFIX}{name}.lora_embedding_B": B}
    if isinstance(kind, str):
        raise ValueError(
            f"{name}: found a {kind}, wanted one that PEFT's LoRA computes, which knows its stride and its padding by "
            "zeros only; merge the adapter into the model instead."
        )
    if kind is not None:
        A, B = A.unflatten(1, tuple(kind)), B.reshape(*B.shape, *[1] * (len(kind) - 1))
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def as_matrices(name: str, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Kind]:
    """A (r, n), B (m, r) and the kind of a layer, from LoRA's tensors by what follows ``lora_`` in their names.

    Raises:
        ValueError: they are no such pair: one is missing, ranks differ, a convolution has groups.
    """
    embedding = any(kind.startswith("embedding_") for kind in found)
    kinds = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(found) == set(kinds):
        A, B = (found[kind] for kind in kinds)
        sizes = tuple(A.shape[1:])
        plain = B.dim() == 2 and A.dim() == 2
        kernels = not embedding and 3 <= A.dim() <= 5 and B.shape[2:] == (1,) * (A.dim() - 2)
        if (plain or kernels) and A.shape[0] == B.shape[1]:
            return A.flatten(1), B.flatten(1), "embedding" if embedding else list(sizes) if kernels else None
    shapes = {kind: tuple(matrix.shape) for kind, matrix in found.items()}
    raise ValueError(
        f"{name}: found {shapes}, wanted lora_A (r, n) and lora_B (m, r), or those of an embedding, or of a "
        "convolution without groups, (r, in, kh, kw) and (m, r, 1, 1)."
    )

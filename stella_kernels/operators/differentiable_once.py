"""Gradients that are not to be differentiated again: whoever does is told, instead of getting zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.autocast import outside_autocast

Gradients = tuple[Tensor | None, ...]

REFUSAL = (
    "stella_kernels: a second derivative was asked for; the adapter and the polar factor are differentiable once. "
    "Detach the first gradient, or write the formula in plain torch (stella_kernels.reference) where it is needed."
)


class RefusesDerivatives(torch.autograd.Function):
    """The first tensor, as a result of the others: whoever differentiates it by those is told."""

    @staticmethod
    def forward(result: Tensor, *_others: Tensor | None) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        raise RuntimeError(REFUSAL)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise RuntimeError(REFUSAL)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None) -> tuple[Tensor, int | None]:
        return refusing(*tensors), in_dims[0]


def refusing(*tensors: Any) -> Tensor:
    """The first, whose derivatives by the others are an error."""
    apply: Any = RefusesDerivatives.apply
    return apply(*tensors)


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """``backward(ctx, saved, *grads)``, whose results raise RuntimeError when they are differentiated in turn.

    torch's own once_differentiable cuts the results off from the saved tensors, so that a second derivative by one of
    them comes out as zero, silently. ``saved`` is ``ctx.saved_tensors``, which checkpointing lets one read once only.
    Autocast is off inside, whether backward was called under it or not: the dtypes are those of the forward pass.
    """
    computed = outside_autocast(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():  # enabled in backward by create_graph=True
            return computed(ctx, saved, *grads)
        with torch.no_grad():
            results = computed(ctx, saved, *grads)
        if torch.compiler.is_compiling():
            return results
        return tuple(None if result is None else refusing(result, *grads, *saved) for result in results)

    return wrapper

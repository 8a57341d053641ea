"""The output of a base layer with its adapters, in as few passes over the activations as the base allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import functional


def is_untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` is its class's ``forward`` and no more: no hook sees or replaces what it returns."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(own) and not nn.modules.module._has_any_global_hook()


def _plain_linear(module: nn.Module) -> nn.Linear | None:
    """``module`` where calling it is F.linear of ordinary tensors and no more, so one node can do it; else None."""
    if type(module) is not nn.Linear or type(module.weight) not in (Tensor, nn.Parameter):
        return None
    return module if is_untouched(module) else None


# U, S, Vt, scale, and the probability of dropout in force
Term = tuple[Tensor, Tensor, Tensor, float, float]


def start_term(U0: Tensor, Vt0: Tensor, scale: float) -> Term:
    """``−s · x V0 U0ᵀ``: what "pseudo_zero" takes away. Never dropped out, as if the base had lost it."""
    return U0, U0.new_full((U0.shape[1],), -1.0), Vt0, scale, 0.0


def _joined(terms: Sequence[Term], most: int) -> list[Term]:
    """The terms with those of one dropout probability joined to one, as long as its rank is at most ``most``."""
    joined: list[Term] = []
    for p in dict.fromkeys(term[4] for term in terms):
        adapters = [term[:4] for term in terms if term[4] == p]
        if sum(Vt.shape[0] for _, _, Vt, _ in adapters) <= most:
            joined.append((*functional.join_adapters(adapters), p))
        else:
            joined += [(*adapter, p) for adapter in adapters]
    return joined


def adapted_output(
    base: nn.Module,
    x: Tensor,
    terms: Sequence[Term],
    owned: bool,
    recompute: bool = False,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The output of ``base`` on ``x``, (..., n) to (..., m), plus every adapter in ``terms``, of which there is one.

    Adapters with the same dropout are computed together, under one mask. A plain ``nn.Linear`` and its first adapter
    are one autograd node; any other base is called with ``args`` and ``kwargs``.

    Args:
        owned: what the base returns is nobody else's and may be overwritten; else it is copied.
    """
    m, n = terms[0][0].shape[0], terms[0][2].shape[1]
    first, *rest = terms if len(terms) == 1 else _joined(terms, min(m, n))
    plain = None if args or kwargs else _plain_linear(base)
    if plain is not None:
        y = functional.stella_linear(x, plain.weight, plain.bias, *first, recompute=recompute)
    else:
        y = base(x, *args, **(kwargs or {}))
        # hooks, the base's own backward or the caller may hold what it returned
        y = functional.stella_adapter(y if owned else y.clone(), x, *first, recompute=recompute)
    for term in rest:
        y = functional.stella_adapter(y, x, *term, recompute=recompute)
    return y

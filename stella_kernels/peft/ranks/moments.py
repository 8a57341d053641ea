"""What an optimizer remembers of parameters whose columns or rows are turned and cut, as when an adapter's rank falls.

With ``U = U' Pᵀ`` for an orthogonal P the gradient of U' is that of U times P. What is linear in the gradients (Adam's
first moment, SGD's momentum) is therefore turned alike, exactly. What sums their squares, element by element, holds no
products of different columns: its turned value takes the columns as uncorrelated, ``v'_ij = Σ_k v_ik P_kj²``, which
keeps it positive and each row's sum what it was, and is exact where P only permutes and flips. Cutting drops columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...optim.adamw import StellaAdamW
from ...optim.attachment import Attachment, attachments_of
from ...optim.guard import Guard
from ...optim.wrappers import hooked_optimizers

LINEAR = ("exp_avg", "momentum_buffer", "grad_avg")
SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


@dataclass(frozen=True, eq=False)
class Turn:
    """``parameter ← rowsᵀ · parameter · columns``, float64; None is the identity. A vector has rows only."""

    parameter: nn.Parameter
    name: str
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __call__(self, value: Tensor, squared: bool = False) -> Tensor:
        """The turned value, in the dtype and on the device of ``value``."""
        result = value.double()
        for side, matrix in (("rows", self.rows), ("columns", self.columns)):
            if matrix is not None:
                matrix = matrix.to(result.device)
                matrix = matrix.square() if squared else matrix
                result = matrix.mT @ result if side == "rows" else result @ matrix
        return result.to(value.dtype).contiguous()


def check_moments(optimizer: Optimizer, turns: Iterable[Turn]) -> None:
    """Raise ``ValueError`` where the optimizer keeps something of a parameter that nobody knows how to turn."""
    for turn, state in _states(optimizer, turns):
        for key, value in state.items():
            known = key in LINEAR or key in SQUARED
            if isinstance(value, Tensor) and value.dim() > 0 and not (known and value.shape == turn.parameter.shape):
                raise ValueError(
                    f"optimizer: found {key!r} of shape {tuple(value.shape)} in its state of {turn.name}, wanted "
                    f"some of {', '.join((*LINEAR, *SQUARED))} in the parameter's shape, which are known to follow a "
                    "rotation; train with Adam, AdamW, StellaAdamW, RMSprop or SGD, or cut the rank after training."
                )


def turn_moments(optimizer: Optimizer, turns: Iterable[Turn]) -> None:
    """Have the optimizer's state follow; call it before the parameters change, after ``check_moments``."""
    for turn, state in list(_states(optimizer, turns)):
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[key] = turn(value, key in SQUARED)


def renew(optimizer: Optimizer) -> None:
    """Have the geometry of an optimizer begin anew at factors that were given other shapes, which are orthonormal."""
    optimizers = hooked_optimizers(optimizer)
    attachments = {id(a): a for one in optimizers for a in attachments_of(one)}
    for one in sorted(attachments.values(), key=lambda a: a._number):
        # the same object: callers hold it to remove it
        held, family, settings, products = one._alive(), one._roster.family, one._settings, one._products()
        one.remove()
        Attachment.__init__(one, held, family, one.factors, settings, products)
    for inner in optimizers:
        if isinstance(inner, StellaAdamW):
            inner._guard = Guard((), inner._guard.policy)
            inner._constrain(inner.factors)


def _states(optimizer: Optimizer, turns: Iterable[Turn]) -> Iterator[tuple[Turn, dict[str, Any]]]:
    """What is kept of each parameter, once, also where a wrapper shows the state of the optimizer inside."""
    optimizers = hooked_optimizers(optimizer)
    for turn in turns:
        found = [one.state[turn.parameter] for one in optimizers if turn.parameter in one.state]
        for state in {id(one): one for one in found}.values():
            yield turn, state

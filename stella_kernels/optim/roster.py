"""Which parameters of an optimizer are constrained, kept true while groups, modules and parameters change."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn import StiefelFactor, stiefel_factors
from . import targets

_IDLE_STEPS = 3  # without any gradient at all, before it is said that there never will be one


class Roster:
    """The model that was given, where one was, and what is known of the parameters of its optimizer.

    Args:
        target: what the factors were found in; of a model its live factors are looked up when an unknown parameter is
            about to move.
        optimizer: the optimizer that holds them.
    """

    def __init__(self, target: object, optimizer: Optimizer) -> None:
        is_model = isinstance(target, nn.Module) and not isinstance(target, nn.ParameterList)
        self._model: weakref.ref[nn.Module] | None = weakref.ref(target) if is_model else None  # type: ignore[arg-type]
        self._optimizer = weakref.ref(optimizer)
        self._free: dict[int, weakref.ref[Tensor]] = {}  # parameters known to be no factors; ids may be used again
        self._moved = False  # whether a factor ever had a gradient
        self._idle = 0

    def newcomers(self, moving: Iterable[Tensor]) -> list[StiefelFactor]:
        """Factors of the model among parameters that are about to move and are not constrained yet."""
        unknown = []
        for parameter in moving:
            known = self._free.get(id(parameter))
            if known is None or known() is not parameter:
                unknown.append(parameter)
        if not unknown:
            return []
        live = {id(f.parameter): f for f in self._live()}
        for parameter in unknown:
            if id(parameter) not in live:
                self._free[id(parameter)] = weakref.ref(parameter)
        return [live[id(parameter)] for parameter in unknown if id(parameter) in live]

    def check_held(self, factors: Sequence[StiefelFactor], held: int) -> None:
        """Raise ``ValueError`` unless ``held``, the number of factors found in the groups, is all of them."""
        if held == len(factors):
            return
        optimizer = self._optimizer()
        assert optimizer is not None
        places = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._refuse_replaced([f for f in factors if id(f.parameter) not in places])
        targets.check_held(optimizer, factors)
        raise ValueError(
            f"param_groups: found {held} places that hold the {len(factors)} constrained factors, wanted each factor "
            "once."
        )

    def check_moving(self, factors: Sequence[StiefelFactor], active: int, others: bool) -> None:
        """Raise ``RuntimeError`` where no factor has had a gradient yet, as a step begins.

        Args:
            factors: all that are constrained.
            active: how many of them have a gradient.
            others: whether another parameter of the optimizer has one.
        """
        if active or self._moved:
            self._moved = True
            return
        self._refuse_replaced(factors)
        self._idle += 1
        if not others and self._idle < _IDLE_STEPS:
            return  # a step before the first backward moves nothing
        raise RuntimeError(
            f"optimizer.step(): no gradient was found in any of the {len(factors)} constrained factors "
            f"({factors[0].name}, …), wanted one after backward(), else they never train. Either the model was sharded "
            "or its parameters were replaced after this optimizer was built (build it afterwards), or the loss does "
            "not depend on the adapters (are they active?), or the optimizer steps inside backward and frees the "
            "gradients there (LOMO), which cannot be constrained."
        )

    def _live(self) -> list[StiefelFactor]:
        model = self._model() if self._model is not None else None
        return [] if model is None else stiefel_factors(model)

    def _refuse_replaced(self, missing: Sequence[StiefelFactor]) -> None:
        """Where the model has another parameter by the same name, or sharded ones, say so."""
        live = {f.name: f.parameter for f in self._live()}
        replaced = [f for f in missing if f.name in live and live[f.name] is not f.parameter]
        if replaced:
            now = live[replaced[0].name]
            raise ValueError(
                f"optimizer: {', '.join(f.name for f in replaced)} of the model is another parameter now "
                f"({type(now).__name__}) than the one that is constrained, as engines do that shard or flatten a model "
                "(fully_shard, Accelerate's prepare, DeepSpeed). Prepare the model first, then build the optimizer and "
                "attach; factors that are sharded cannot be constrained yet: leave the adapters whole, or train with "
                "distributed data parallel."
            )

"""Optimizers inside optimizers, and closures: which run step hooks, which step is the outermost, what a copy keeps."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from torch.optim import Optimizer


def hooked_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """``optimizer`` and those inside it, outermost first, as far as they run step hooks.

    A wrapper that ran ``Optimizer.__init__`` runs hooks around all that it does (Lookahead moves parameters after the
    inner step); one that did not hands ``step`` over (Accelerate's). Where one has a second way to step (SAM), the
    hooks of the optimizer inside see it.

    Raises:
        TypeError: none of them runs step hooks.
    """
    found: list[Optimizer] = []
    waiting, seen = [optimizer], {id(optimizer)}
    while waiting:
        one = waiting.pop(0)
        if "_optimizer_step_pre_hooks" in vars(one) and getattr(type(one).step, "hooked", False):
            found.append(one)
        inside = [value for value in vars(one).values() if isinstance(value, Optimizer) and id(value) not in seen]
        seen.update(map(id, inside))
        waiting += inside
    if not found:
        raise TypeError(
            f"optimizer: found {type(optimizer).__name__}, which never ran torch.optim.Optimizer.__init__ and has no "
            "optimizer inside, so that it runs no step hooks; wanted one that does: call super().__init__ in it, or "
            "attach to the optimizer that moves the parameters."
        )
    return found


def steps_under_way(optimizers: Sequence[Optimizer], frame: FrameType | None = None) -> int:
    """How many ``step`` calls of these optimizers, hooks and all, the call stack is inside of.

    More than one where ``super().step()`` or a wrapper calls another: the outermost is the step. The call stack is
    asked, since a count kept here would be wrong for ever after an optimizer that raised.
    """
    steps = 0
    frame = frame or sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer":
            inside = frame.f_locals.get("self")
            steps += any(inside is one for one in optimizers)
        frame = frame.f_back
    return steps


def copies_through(
    optimizer: Optimizer, reattach: Callable[[], tuple[Callable[..., Any], Any]], keeper: type[Any]
) -> None:
    """``copy.deepcopy`` and ``pickle`` of ``optimizer`` lose its hooks: have them call ``reattach``'s function.

    ``reattach()`` returns a function of the module's level and its second argument; the first is the copy. Hooks of
    ``keeper`` objects are left out of the state, where a class's own ``__getstate__`` has them in it.
    """

    reference = weakref.ref(optimizer)

    def reduce(protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        original: Any = reference()
        plain: Any = original.__class__.__reduce_ex__(original, protocol)
        make, arguments, state = plain[:3]
        if isinstance(state, dict):
            state = {key: _others(value, keeper) for key, value in state.items() if key != "__reduce_ex__"}
        return _rebuilt, (make, arguments, state, *reattach())

    vars(optimizer)["__reduce_ex__"] = reduce


def _others(value: Any, keeper: type[Any]) -> Any:
    """Hooks without those of ``keeper`` objects; anything else as it is."""
    if not isinstance(value, OrderedDict):
        return value
    kept = ((key, each) for key, each in value.items() if not isinstance(getattr(each, "__self__", None), keeper))
    return OrderedDict(kept)


def copies_plainly(optimizer: Optimizer) -> None:
    """Undo :func:`copies_through`."""
    vars(optimizer).pop("__reduce_ex__", None)


def _rebuilt(
    make: Callable[..., Any], arguments: tuple[Any, ...], state: Any, again: Callable[..., Any], what: Any
) -> Any:
    copy = make(*arguments)
    copy.__setstate__(state)
    again(copy, what)
    return copy


def followed(closure: Callable[[], Any], after: Callable[[], None], failed: Callable[[], None]) -> Callable[[], Any]:
    """The closure, with ``after`` once it has returned, or ``failed`` once it has raised."""

    def evaluate() -> Any:
        try:
            loss = closure()
        except BaseException:
            failed()
            raise
        after()
        return loss

    return evaluate


def refuse_second_evaluation() -> NoReturn:
    """Raise for a closure that an optimizer evaluates again within a step, after it has moved something."""
    raise RuntimeError(
        "closure: it was evaluated a second time within one step, where a constrained factor had moved already, wanted "
        "one evaluation before anything moves: gradients at different points of the manifold cannot be combined. "
        "Optimizers that search along a line, such as LBFGS, cannot be attached; the constrained factors were put "
        "back, other parameters may have moved."
    )

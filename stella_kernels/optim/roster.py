"""Which parameters of an optimizer are constrained, kept true while groups, modules and parameters change."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn import StiefelFactor, orthonormality_tolerance, stiefel_factors
from ..reference.stiefel import orthonormality_error
from . import targets

_IDLE_STEPS = 3  # without a gradient of any factor, before it is said that they do not train

_rosters: weakref.WeakSet[Roster] = weakref.WeakSet()


class Family:
    """Where the factors of a model are looked up: its modules, each held weakly, so that none is kept alive.

    A target that was only a wrapper, or a list made for the call, may go; its parts are still found. A copy, which may
    be made without the model, is told the factors there are, frozen ones too.
    """

    def __init__(self, target: object) -> None:
        is_model = isinstance(target, nn.Module) and not isinstance(target, nn.ParameterList)
        modules = target.named_modules() if is_model else ()  # type: ignore[attr-defined]
        self._modules = [(name, weakref.ref(module)) for name, module in modules]
        self._told: list[StiefelFactor] = []

    @property
    def is_blind(self) -> bool:
        """Whether it was copied without a model."""
        return bool(self._told) and not self.is_rooted

    @property
    def is_rooted(self) -> bool:
        """Whether there is a model, or a part of one, to look up factors in."""
        return bool(self._roots())

    def members(self, frozen: bool = True) -> list[StiefelFactor]:
        """All factors, or those that train now."""
        roots = self._roots()
        found: dict[int, StiefelFactor] = {}
        for prefix, module in roots:
            for f in stiefel_factors(module, frozen):
                found.setdefault(id(f.parameter), replace(f, name=f"{prefix}.{f.name}") if prefix else f)
        if not roots:
            return [f for f in self._told if frozen or f.parameter.requires_grad]
        return list(found.values())

    def places(self, parameters: Sequence[Tensor]) -> list[tuple[dict[str, Any], str, object]]:
        """Where modules keep these, and parents the modules on the way there: dictionary, key, what is kept."""
        wanted = {id(p) for p in parameters}
        found: list[tuple[dict[str, Any], str, object]] = []
        known: dict[int, bool] = {}  # by module, whether it leads to one of them

        def leads(module: nn.Module) -> bool:
            if id(module) not in known:
                known[id(module)] = False
                own, children = module._parameters, module._modules
                kept: list[tuple[dict[str, Any], str, object]]
                kept = [(own, key, p) for key, p in own.items() if id(p) in wanted]
                kept += [
                    (children, key, child) for key, child in children.items() if child is not None and leads(child)
                ]
                found.extend(kept)
                known[id(module)] = bool(kept)
            return known[id(module)]

        for _, root in self._roots():
            leads(root)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_modules": [], "_told": self.members()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        copied = Family(None)
        copied._told = [
            replace(f, parameter=deepcopy(f.parameter, memo), core=deepcopy(f.core, memo)) for f in self.members()
        ]
        # where the model was copied along with the optimizer, before it, its copy is the model
        pairs = [(name, memo.get(id(reference()))) for name, reference in self._modules]
        copied._modules = [(name, weakref.ref(module)) for name, module in pairs if module is not None]
        return copied

    def _roots(self) -> list[tuple[str, nn.Module]]:
        """The model, or the outermost of its modules that are still there."""
        found: list[tuple[str, nn.Module]] = []
        for name, reference in self._modules:  # parents come first, and what is in one follows at once
            if found and (found[-1][0] == "" or f"{name}.".startswith(f"{found[-1][0]}.")):
                continue
            if (module := reference()) is not None:
                found.append((name, module))
                if name == "":
                    break
        return found


class Roster:
    """The model that was given, where one was, and what is known of the parameters of its optimizer.

    Args:
        family: where factors are looked up when an unknown parameter is about to move.
        optimizer: the optimizer that holds them.
    """

    def __init__(self, family: Family, optimizer: Optimizer) -> None:
        self.family = family
        self._optimizer = weakref.ref(optimizer)
        # Parameters that moved and are no factors. Held, not weakly: a weak reference forbids torch.swap_tensors.
        self._free: dict[int, Tensor] = {}
        if family.is_blind:  # what comes later cannot be looked up
            members = {id(f.parameter) for f in family.members()}
            self._free = {i: p for i, p in self._held().items() if i not in members}
        # dictionaries of modules, keys, and what is kept there: one comparison in C for all of them
        self._places: tuple[list[dict[str, Any]], list[str], list[Any]] = ([], [], [])
        self._moved = False  # whether a factor ever had a gradient
        self._warned: set[str] = set()
        self._idle = self._steps = self._most = 0
        self._pause = self._next_look = 1
        _rosters.add(self)

    def constrain(self, factors: Sequence[StiefelFactor]) -> None:
        """These are constrained from now on, and no others."""
        places = self.family.places([f.parameter for f in factors])
        self._places = ([d for d, _, _ in places], [k for _, k, _ in places], [p for _, _, p in places])

    def newcomers(self, moving: Iterable[Tensor]) -> list[StiefelFactor]:
        """Factors of the model, frozen ones too, among parameters that are about to move and are not constrained yet.

        Raises:
            ValueError: what joined a copy that was made without its model looks like a factor.
        """
        free = self._free
        unknown = [p for p in moving if id(p) not in free]
        if not unknown:
            return []
        members = {id(f.parameter): f for f in self.family.members()}
        strangers = [p for p in unknown if id(p) not in members]
        if self.family.is_blind and any(map(_looks_constrained, strangers)):
            raise ValueError(
                "param_groups: found a parameter with orthonormal columns that joined this optimizer after it was "
                "copied or unpickled without its model, so that nobody can tell whether it is a factor, wanted an "
                "optimizer that knows the model: build one for the model, and load this one's state_dict."
            )
        held = self._held()
        self._free = {i: p for i, p in free.items() if i in held}  # those taken out of the groups may be freed
        self._free.update((id(p), p) for p in strangers)
        return [members[id(p)] for p in unknown if id(p) in members]

    def check_held(self, factors: Sequence[StiefelFactor], held: int) -> None:
        """Raise ``ValueError`` unless ``held``, the number of factors found in the groups, is all of them."""
        if held == len(factors):
            return
        optimizer = self._optimizer()
        assert optimizer is not None
        places = self._held()
        self._refuse_replaced([f for f in factors if id(f.parameter) not in places], {})
        targets.check_held(optimizer, factors)
        raise ValueError(
            f"param_groups: found {held} places that hold the {len(factors)} constrained factors, wanted each factor "
            "once."
        )

    def successors(self, factors: Sequence[StiefelFactor], held: int) -> list[StiefelFactor]:
        """The factors as model and optimizer have them now, where an engine has replaced parameters in both; or none.

        Accelerate's prepare does so: it shards the model, and gives the optimizer the parameters that came of it.
        """
        if held == len(factors):
            return []
        optimizer, places = self._optimizer(), self._held()
        assert optimizer is not None
        missing = [f for f in factors if id(f.parameter) not in places]
        if not missing:
            return []
        live = {f.name: f for f in self.family.members() if id(f.parameter) in places}
        if any(f.name not in live or f.parameter in optimizer.state for f in missing):
            return []
        return [f if id(f.parameter) in places else live[f.name] for f in factors]

    def check_moving(self, factors: Sequence[StiefelFactor], active: int) -> None:
        """As a step begins: whether it trains the model's factors, of which ``active`` have a gradient.

        Raises:
            ValueError: the model has other parameters now, or trains factors that no optimizer holds.
            RuntimeError: no factor has ever had a gradient, after a few steps.
        """
        self._steps = steps = self._steps + 1
        dictionaries, keys, parameters = self._places
        try:
            replaced = not all(map(is_, map(getitem, dictionaries, keys), parameters))
        except KeyError:
            replaced = True
        if replaced:
            self._refuse_replaced(factors, self._held())
            self.constrain(factors)  # moved to another module, or deleted
        fewer = active < self._most or not factors[steps % len(factors)].parameter.requires_grad
        if fewer and steps >= self._next_look:
            self._look(factors)
            self._pause *= 2  # each look takes in the whole model
            self._next_look = steps + self._pause
        elif steps & (steps - 1) == 0 and steps > 1:
            self._look(factors)
        if active:
            self._moved, self._idle = True, 0
            self._most = max(self._most, active)
        elif any(f.parameter.requires_grad for f in factors):
            self._idle += 1
            if self._idle >= _IDLE_STEPS or not self._moved:
                self._say_idle(factors)

    def _say_idle(self, factors: Sequence[StiefelFactor]) -> None:
        if not self._moved:
            self._look(factors)
        if self._idle < _IDLE_STEPS:
            return  # a step before the first backward, or of another loss, moves no factor
        text = (
            f"optimizer.step(): no gradient was found in any of the {len(factors)} constrained factors "
            f"({factors[0].name}, …) in {self._idle} steps, wanted one after backward(), else they never train. Either "
            "the model was sharded or its parameters were replaced after this optimizer was built (build it "
            "afterwards), or the loss does not depend on the adapters (are they active? freeze them, with "
            "requires_grad_(False), while something else is trained), or the optimizer steps inside backward and frees "
            "the gradients there (LOMO), which cannot be constrained."
        )
        if not self._moved:
            raise RuntimeError(text)
        if "" not in self._warned:
            self._warned.add("")
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _look(self, factors: Sequence[StiefelFactor]) -> None:
        """Compare with the model as it is now."""
        held = self._held()
        self._refuse_replaced(factors, held)
        self._warn_of_orphans(factors)
        constrained = {id(f.parameter) for f in factors}
        members = self.family.members(frozen=False)
        for f in members:
            self._free.pop(id(f.parameter), None)  # its module joined the model after it had moved
        left = [f for f in members if id(f.parameter) not in constrained and id(f.parameter) not in held]
        left = [f for f in left if f.parameter.grad is not None and f.name not in self._warned]
        if not left:
            return
        elsewhere = {i for roster in _rosters for i in roster._held()}
        names = [f.name for f in left if id(f.parameter) not in elsewhere]
        if not names:
            return
        text = (
            f"optimizer: it does not hold {', '.join(names)} of the model, which have gradients and never move: they "
            "joined the model, or became active, after it was built. Add them with optimizer.add_param_group, without "
            "weight decay, or build the optimizer again."
        )
        if not any(f.parameter.grad is not None and f.parameter.requires_grad for f in factors):
            raise ValueError(text)  # all that moves is what does not train
        self._warned.update(names)
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _warn_of_orphans(self, factors: Sequence[StiefelFactor]) -> None:
        """Say which factors get no gradient, and are in no module, where no model is known that could be asked."""
        idle = [f for f in factors if f.parameter.requires_grad and f.parameter.grad is None]
        idle = [f for f in idle if f.name not in self._warned]
        if not idle or len(idle) == len(factors) or self.family.is_rooted:
            return
        in_modules = _in_modules([f.parameter for f in idle])
        names = [f.name for f in idle if id(f.parameter) not in in_modules]
        if names:
            self._warned.update(names)
            warnings.warn(
                f"optimizer.step(): {', '.join(names)} had no gradient where other factors had one, and no module has "
                "this parameter: if it was replaced (load_state_dict(..., assign=True), an engine that shards or "
                "flattens a model), its successor is never trained. Load and prepare the model first, then build the "
                "optimizer and attach.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _held(self) -> dict[int, Tensor]:
        optimizer = self._optimizer()
        return {} if optimizer is None else {id(p): p for group in optimizer.param_groups for p in group["params"]}

    def _refuse_replaced(self, missing: Sequence[StiefelFactor], held: dict[int, Tensor]) -> None:
        """Where the model has another parameter by the same name, or sharded ones, that is not ``held``, say so."""
        members = self.family.members()
        present = {id(f.parameter) for f in members}  # by another name perhaps, where a layer was put in front
        live = {f.name: f.parameter for f in members if id(f.parameter) not in held}
        replaced = [f for f in missing if f.name in live and id(f.parameter) not in present]
        if replaced:
            now = live[replaced[0].name]
            raise ValueError(
                f"optimizer: {', '.join(f.name for f in replaced)} of the model is another parameter now "
                f"({type(now).__name__}) than the one that is constrained, as engines do that shard or flatten a model "
                "(fully_shard, DeepSpeed), and load_state_dict(..., assign=True). Prepare and load the model first, "
                "then build the optimizer and attach."
            )


def _in_modules(parameters: Sequence[Tensor]) -> set[int]:
    """Ids of those that some module has, found from the parameters: slow, for what is asked seldom."""
    places = [place for place in gc.get_referrers(*parameters) if isinstance(place, dict)]
    owned: set[int] = set()
    for owner in gc.get_referrers(*places):
        own = (
            owner._parameters
            if isinstance(owner, nn.Module)
            else owner.get("_parameters")
            if isinstance(owner, dict)
            else None
        )
        owned.update(id(place) for place in places if place is own)
    return {id(p) for place in places if id(place) in owned for p in place.values()}


@torch.no_grad()
def _looks_constrained(p: Tensor) -> bool:
    """Whether columns or rows are orthonormal, which is hardly a coincidence."""
    if p.dim() != 2 or not p.is_floating_point() or p.is_meta or p.numel() == 0 or p.shape[0] == p.shape[1]:
        return False
    transposed = p.shape[0] < p.shape[1]
    factor = StiefelFactor(nn.Parameter(p.detach(), requires_grad=False), transposed, "")
    view = factor.view.float() if p.dtype in targets.HALF_DTYPES else factor.view
    return float(orthonormality_error(view)) <= orthonormality_tolerance(factor)

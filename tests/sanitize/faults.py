"""One thing wrong with the arguments of a call, which an operator has to refuse, with all it was given as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.sanitize.case import Call
from tests.sanitize.layouts import Held, hold

_OVER_LISTS = ("riemannian_gradient_", "project_retract_", "stella_adamw_")
_PAIRED = ("gradients", "factors", "snapshots", "moved", "previous", "exp_avgs", "exp_avg_sqs")
_Place = tuple[str, int | None]  # an argument, and where in its list


def _tensors(call: Call, skip: tuple[str, ...] = ("seed", "hyperparameters")) -> list[_Place]:
    """Where there are tensors with elements."""
    found: list[_Place] = []
    for name, value in call.arguments.items():
        if name in skip:
            continue
        each = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        found += [(name, i) for i, t in each if isinstance(t, Held) and t.view.numel()]
    return found


def _at(call: Call, place: _Place) -> Held:
    name, i = place
    held: Held = call.arguments[name] if i is None else call.arguments[name][i]
    return held


def _put(call: Call, place: _Place, value: Any) -> None:
    name, i = place
    if i is None:
        call.arguments[name] = value
    else:
        call.arguments[name] = [*call.arguments[name][:i], value, *call.arguments[name][i + 1 :]]


def _instead(random: Random, call: Call, place: _Place, value: Tensor) -> None:
    _put(call, place, hold(random, value, _at(call, place).written))


def _dtype(random: Random, call: Call) -> str:
    """Of no floating point, or of another in a pair."""
    places = _tensors(call)
    if not places:
        return ""
    place = random.choice(places)
    dtypes = [torch.int64, torch.bool, torch.complex64]
    if place[0] in _PAIRED:
        dtypes += [each for each in (torch.float32, torch.float64) if each != _at(call, place).view.dtype]
    elif place[0] == "couplings":
        dtypes.append(torch.float16)
    dtype = random.choice(dtypes)
    _instead(random, call, place, _at(call, place).view.nan_to_num(1.0).to(dtype))
    return f"dtype of {place}"


def _dimensions(random: Random, call: Call) -> str:
    places = [p for p in _tensors(call) if call.operator != "philox_dropout" and p[0] != "S"]
    if not places:
        return ""
    place = random.choice(places)
    view = _at(call, place).view
    fewer = view.flatten()[0] if call.operator == "polar" or random.random() < 0.5 else view[0]
    value = fewer if call.operator == "polar" or random.random() < 0.5 else view[None]
    if call.operator == "polar" and random.random() < 0.5:
        value = view.flatten()
    _instead(random, call, place, value)
    return f"dimensions of {place}"


# Along which a size is another argument's too.
_BOUND: dict[str, tuple[int, ...]] = {"x": (1,), "U": (1,), "A": (0, 1), "S": (0,), "Vt": (0, 1), "b": (0,)}


def _size(random: Random, call: Call) -> str:
    if call.operator in ("polar", "philox_dropout"):
        return ""
    if call.operator in _OVER_LISTS and len(call.arguments) == 3 and len(call.arguments["factors"]) == 0:
        return ""
    places = _tensors(call, skip=("seed",))
    if not places:
        return ""
    place = random.choice(places)
    view = _at(call, place).view
    dims = _BOUND.get(place[0], tuple(range(view.dim())))
    if call.operator != "adapter_product" and place[0] in ("x", "U"):
        dims = (0, 1)
    dim = random.choice(dims)
    if random.random() < 0.5:
        value = torch.cat([view, view.narrow(dim, 0, 1)], dim)
    else:
        value = view.narrow(dim, 0, view.shape[dim] - 1)
    if place[0] == "couplings" and not value.numel():  # none is given, then
        return ""
    if place[0] == "hyperparameters":
        memory = value.contiguous()
        _put(call, place, Held(memory, memory.flatten(), memory.flatten().clone()))
    else:
        _instead(random, call, place, value)
    return f"size {dim} of {place}"


def _wide(random: Random, call: Call) -> str:
    """Fewer rows than columns."""
    lists = [name for name in call.arguments if name in _PAIRED and call.arguments[name]] or ["M"]
    if call.operator not in (*_OVER_LISTS, "polar") or (lists != ["M"] and not call.arguments[lists[0]]):
        return ""
    places: list[_Place] = [(name, None if name == "M" else 0) for name in lists]
    if "M" not in call.arguments and lists == ["M"]:
        return ""
    shape = _at(call, places[0]).view.shape
    if shape[-1] == shape[-2]:
        return ""
    for place in places:
        held = _at(call, place)
        _put(call, place, Held(held.view.mT, held.memory, held.before, held.written))
    return "more columns than rows"


def _length(random: Random, call: Call) -> str:
    """A list of another length than the others."""
    names = [name for name, value in call.arguments.items() if isinstance(value, list) and value]
    if not names:
        return ""
    name = random.choice(names)
    value = call.arguments[name]
    if random.random() < 0.5:
        value = [*value, value[-1]]
    elif name == "snapshots" and len(value) == 1:
        return ""
    else:
        value = value[:-1]
    call.arguments[name] = value
    return f"length of {name}"


def _number(random: Random, call: Call) -> str:
    if "p" in call.arguments:
        call.arguments["p"] = random.choice((-0.1, 1.5, math.nan, math.inf, -math.inf))
        return "p"
    if call.arguments.get("divisors"):
        i = random.randrange(len(call.arguments["divisors"]))
        _put(call, ("divisors", i), random.choice((0.0, -1.0, math.nan)))
        return "a divisor"
    if "hyperparameters" in call.arguments:
        table = _at(call, ("hyperparameters", None)).view.clone()
        if not len(table):
            return ""
        column, values = random.choice(((4, (0.0, -1.0, math.nan)), (5, (0.0, -1.0, math.nan))))
        table[random.randrange(len(table)), column] = random.choice(values)
        _put(call, ("hyperparameters", None), Held(table, table.flatten(), table.flatten().clone()))
        return f"hyperparameter {column}"
    return ""


def _word(random: Random, call: Call) -> str:
    if "method" not in call.arguments:
        return ""
    call.arguments["method"] = random.choice(("fast", "", "AUTO", "auto\0", "x" * 5000))
    return "method"


def _seed(random: Random, call: Call) -> str:
    if not call.arguments.get("p") or call.arguments["seed"] is None:
        return ""
    values = (
        torch.tensor(1.0),
        torch.tensor(7, dtype=torch.int32),
        torch.tensor([1, 2]),
        torch.empty(0, dtype=torch.int64),
    )
    value = random.choice(values)
    if call.operator != "philox_dropout" and random.random() < 0.3:
        call.arguments["seed"] = None
    else:
        call.arguments["seed"] = Held(value, value.reshape(-1), value.reshape(-1).clone())
    return "seed"


def _table(random: Random, call: Call) -> str:
    """Hyperparameters of another dtype or in another order of memory."""
    if "hyperparameters" not in call.arguments:
        return ""
    table = _at(call, ("hyperparameters", None)).view
    value = table.float()
    if len(table) > 1 and random.random() < 0.5:
        value = table.mT.contiguous().mT
    memory = value.as_strided((value.numel(),), (1,))
    _put(call, ("hyperparameters", None), Held(value, memory, memory.clone()))
    return "hyperparameters"


def _sparse(random: Random, call: Call) -> str:
    places = [place for place in _tensors(call) if not _at(call, place).written]
    if not places:
        return ""
    place = random.choice(places)
    if _at(call, place).view.dim() == 0:
        return ""
    _put(call, place, _at(call, place).view.to_sparse())
    return f"{place} is sparse"


def _meta(random: Random, call: Call) -> str:
    """A tensor without memory among those that have it."""
    if call.operator == "philox_dropout":  # of which nothing but the shape is asked then
        return ""
    places = [place for place in _tensors(call, skip=()) if not _at(call, place).written]
    if not places or len(_tensors(call, skip=())) < 2:
        return ""
    place = random.choice(places)
    _put(call, place, _at(call, place).view.to("meta"))
    return f"{place} has no memory"


def _overlap(random: Random, call: Call) -> str:
    """What is written, in the memory of another argument or in one element several times over."""
    written = [place for place in _tensors(call) if _at(call, place).written]
    if not written:
        return ""
    place = random.choice(written)
    view = _at(call, place).view
    others = [p for p in _tensors(call) if p != place and _at(call, p).view.shape == view.shape]
    others = [p for p in others if _at(call, p).view.dtype == view.dtype and _at(call, p).view is not view]
    if others and random.random() < 0.6:
        _put(call, random.choice(others), _at(call, place))
        return f"{place} is another argument as well"
    if view.shape[0] < 2:
        return ""
    memory = view[:1].clone()
    _put(call, place, Held(memory.expand(view.shape), memory.flatten(), memory.flatten().clone(), written=True))
    return f"{place} is expanded"


_FAULTS: tuple[Callable[[Random, Call], str], ...] = (
    *(_dtype, _dimensions, _size, _wide, _length, _number, _word, _seed, _table, _sparse, _meta, _overlap),
)


def break_one(random: Random, call: Call) -> Call:
    """``call`` with one fault, or as it is where chance finds none that fits; a fault that is there already stays."""
    if call.fault or not call.held():
        return call
    for fault in random.sample(_FAULTS, 3):
        call.fault = fault(random, call)
        if call.fault:
            break
    return call

"""What StellaAdamW does not have, or cannot do in this step: asked before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import AdamW

from ...checks import NonFiniteError, check_choice
from ...nn import StiefelFactor
from ...operators.memory import has_memory
from ...reference import stiefel
from .. import targets
from ..guard import Guard
from .plan import Slot, _address, _device, _dtype, _shape


def refuse_retraction(retraction: str) -> None:
    """Raise ``ValueError`` for retractions that are not fused."""
    check_choice("retraction", retraction, tuple(stiefel.RETRACTIONS))
    if retraction != "polar":
        raise ValueError(
            f"retraction: found {retraction!r}, wanted 'polar', the one StellaAdamW fuses; for others use "
            f"attach(torch.optim.AdamW(...), model, retraction={retraction!r})."
        )


def refuse_options(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for options of torch's AdamW that StellaAdamW does not have."""
    for option in ("amsgrad", "capturable", "differentiable"):
        if group.get(option):
            raise ValueError(
                f"{option}: found {group[option]!r}, wanted False: StellaAdamW does not have it; use "
                f"torch.optim.AdamW({option}=True) with stella_kernels.optim.attach."
            )


def check_free(optimizer: AdamW, free: Sequence[Sequence[Tensor]]) -> None:
    """Raise for what torch's AdamW would stumble over, while no factor has moved yet."""
    for index, parameters in enumerate(free):
        kept = [optimizer.state.get(p) for p in parameters]
        with_state = [(p, state) for p, state in zip(parameters, kept, strict=True) if state]
        owners = [*parameters, *(p for p, _ in with_state), *(p for p, _ in with_state)]
        beside: list[Any] = [p.grad for p in parameters]
        beside += [state["exp_avg"] for _, state in with_state] + [state["exp_avg_sq"] for _, state in with_state]
        if (
            [*map(_shape, owners)] == [*map(_shape, beside)]
            and [*map(_dtype, owners)] == [*map(_dtype, beside)]
            and [*map(_device, owners)] == [*map(_device, beside)]
            and all(map(_address, beside))
        ):
            continue
        for place, (p, t) in enumerate(zip(owners, beside, strict=True)):
            if (t.shape, t.dtype, t.device) != (p.shape, p.dtype, p.device) or not has_memory(t):
                what = "gradient" if place < len(parameters) else "moment"
                raise ValueError(
                    f"param_groups[{index}]: found a {what} of {tuple(t.shape)}, {t.dtype} on {t.device} with a "
                    f"storage of {t.untyped_storage().nbytes()} bytes beside a parameter of {tuple(p.shape)}, "
                    f"{p.dtype} on {p.device}, wanted the same; nothing was changed by this step. Move the optimizer's "
                    "state along, or load its state_dict again."
                )


def check_state_dict(state_dict: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless it is of an AdamW without what StellaAdamW does not have."""
    for index, group in enumerate(state_dict.get("param_groups", ())):
        refuse_options(group)
        if missing := [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]:
            raise ValueError(
                f"state_dict: found param_groups[{index}] without {', '.join(missing)}, so it is of another optimizer, "
                "wanted that of a StellaAdamW or torch.optim.AdamW over the same groups; start without one instead."
            )
    for key, kept in state_dict.get("state", {}).items():
        if kept and (missing := [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in kept]):
            raise ValueError(
                f"state_dict: found state[{key!r}] without {', '.join(missing)}, so it is of another optimizer, wanted "
                "that of a StellaAdamW or torch.optim.AdamW over the same groups; start without one instead."
            )


class SkippedStep(Exception):
    """A step left out before anything was changed, with the names of its causes."""


def refuse_stuck(guard: Guard, stuck: Sequence[StiefelFactor]) -> NoReturn:
    """Raise for factors whose step could not be taken, where the others have taken theirs."""
    names = ", ".join(f.name for f in stuck)
    state = f"The step was not taken for {names}, the other factors have taken it"
    targets.refuse_values(stuck, state)
    guard.refuse_far(stuck, state)
    raise NonFiniteError(
        f"a moment of {names} holds NaN or an infinity, or the learning rate moves it out of range. {state}, so go "
        "on from a checkpoint.",
        [f.name for f in stuck],
    )


def refuse_large(guard: Guard, factors: Sequence[StiefelFactor], skips: bool) -> None:
    """Raise where there are factors, whose moments would overflow; no parameter and no moment has been written."""
    if not factors:
        return
    names = [f.name for f in factors]
    guard.refuse_far(factors, "No parameter and no moment was changed")
    if skips:
        raise SkippedStep(names)
    raise NonFiniteError(
        f"the gradient of {', '.join(names)} is finite and so large that its square overflows; no parameter and no "
        "moment was changed. Zero the gradients and look at the loss of this batch, clip them, or leave such steps "
        "out: skip_nonfinite=True.",
        names,
    )


def refuse_gradients(factors: Sequence[StiefelFactor], names: Sequence[str]) -> None:
    """Raise where there are names, of gradients that are not finite; no parameter and no moment has been written."""
    if names:
        targets.refuse_values(factors, "No parameter and no moment was changed")
        raise NonFiniteError(
            f"the gradient of {', '.join(names)} holds NaN or an infinity; no parameter and no moment was changed. "
            "Zero the gradients and look at the loss of this batch, or leave such steps out: skip_nonfinite=True.",
            names,
        )


def reasons_to_skip(slots: Sequence[Slot], active: Sequence[Slot], free: Sequence[Sequence[Tensor]]) -> list[str]:
    """Names of what has a gradient with NaN or infinity."""
    names = {id(slot.factor.core): f"S beside {slot.factor.name}" for slot in reversed(slots)}
    given = [(slot.factor.name, slot.parameter.grad) for slot in active]
    for index, parameters in enumerate(free):
        given += [(names.get(id(p), f"param_groups[{index}]"), p.grad) for p in parameters]
    gradients = [gradient for _, gradient in given if gradient is not None]
    return sorted({given[i][0] for i in targets.non_finite(gradients)})

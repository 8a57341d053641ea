"""What a fused AdamW step consists of: operator calls for the constrained factors, torch's AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from ...nn import StiefelFactor
from ...operators.memory import has_memory
from ...operators.status import INFO_COLUMNS, STATUS_OVERFLOW
from ...reference import stiefel
from .. import targets

# Columns of the operator's hyperparameters that are written at every step.
LR, STEP = 0, 4

_address = Tensor.data_ptr
_shape, _dtype, _device, _layout = map(attrgetter, ("shape", "dtype", "device", "layout"))


class Slot:
    """A constrained factor and what a step needs of it, kept while its tensors stay the same."""

    def __init__(self, index: int, factor: StiefelFactor, hidden_size: float | None) -> None:
        self.index = index
        self.factor = factor
        self.parameter = factor.parameter
        self.group = 0
        self.view, self.strides = factor.view, factor.parameter.stride()  # (n, r), the parameter's own memory
        self.divisor = stiefel.gradient_scaling_divisor(self.view.shape[0], hidden_size)
        self.state: dict[str, Any] = {}
        self.fresh = False
        self.step = self.exp_avg = self.exp_avg_sq = self.exp_avg_view = self.exp_avg_sq_view = torch.empty(
            0, device="cpu"
        )

    def follow(self, state: dict[str, Any] | None) -> bool:
        """Renew what has changed since the last step; whether the parameter's own memory has.

        Views are asked where they point to: storage may have been freed under them, and its address given out again.
        """
        moved = self.parameter.data_ptr() != self.view.data_ptr() or self.parameter.stride() != self.strides
        if moved:
            self.view, self.strides = self.factor.view, self.parameter.stride()
        self.fresh = not state
        if not state:
            scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32  # as torch does
            state = {
                "step": torch.tensor(0.0, dtype=scalar, device="cpu"),
                "exp_avg": torch.zeros_like(self.parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(self.parameter, memory_format=torch.preserve_format),
            }
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if (
            moved
            or m is not self.exp_avg
            or v is not self.exp_avg_sq
            or not m.data_ptr() == self.exp_avg_view.data_ptr() != 0  # .data may have been replaced
            or not v.data_ptr() == self.exp_avg_sq_view.data_ptr() != 0
        ):
            self.exp_avg_view, self.exp_avg_sq_view = self._tall("exp_avg", state), self._tall("exp_avg_sq", state)
            self.exp_avg, self.exp_avg_sq = m, v
        step = state["step"]
        if not step.is_cpu:  # of a fused AdamW; read here at every step
            step = state["step"] = step.cpu()
        self.step, self.state = step, state
        return moved

    def gradient(self) -> Tensor:
        """The gradient as (n, r)."""
        return targets.tall_gradient(self.factor)

    def _tall(self, key: str, state: dict[str, Any]) -> Tensor:
        moment: Tensor = state[key]
        p = self.parameter
        if not has_memory(moment):
            raise ValueError(
                f"{self.factor.name}: found a moment {key} whose storage was freed, wanted one in memory; bring the "
                "optimizer's state back before the step."
            )
        if (moment.device, moment.dtype, moment.shape) != (p.device, p.dtype, p.shape):
            raise ValueError(
                f"{self.factor.name}: found a moment {key} of {tuple(moment.shape)}, {moment.dtype} on {moment.device} "
                f"beside the factor of {tuple(p.shape)}, {p.dtype} on {p.device}; move the optimizer's state along, or "
                "load its state_dict again."
            )
        return moment.mT if self.factor.transposed else moment


class Settled:
    """The tensors of active factors as a step left them, in lists: asked of all at once whether there is any change.

    Attributes:
        views, exp_avgs, exp_avg_sqs: what the operator is given, (n, r) each.
        counters: the steps taken, in one memory (k,), of which each state has its element: hundreds of tensors of one
            number each are slow to read and to advance.
    """

    def __init__(self, active: list[Slot]) -> None:
        self._active = active
        self._fresh = any(slot.fresh for slot in active)
        self._parameters = [slot.parameter for slot in active]
        self._strides = [slot.strides for slot in active]
        self._states = [slot.state for slot in active]
        self._moments = [slot.exp_avg for slot in active], [slot.exp_avg_sq for slot in active]
        self.views = [slot.view for slot in active]
        self.exp_avgs = [slot.exp_avg_view for slot in active]
        self.exp_avg_sqs = [slot.exp_avg_sq_view for slot in active]
        self.counters = torch.stack([slot.step for slot in active])
        for slot, counter in zip(active, self.counters.unbind(), strict=True):
            slot.state["step"] = slot.step = counter
        self._steps = [slot.step for slot in active]
        self._places = [*map(_address, self._steps)]

    def holds(self, active: list[Slot], states: list[Any]) -> bool:
        """Whether there is nothing to ``follow`` in any of these, as at nearly every step."""
        if self._fresh or active != self._active or not all(map(is_, states, self._states)):
            return False
        first, second = self._moments
        return (
            all(map(is_, [state["step"] for state in states], self._steps))
            and all(map(is_, [state["exp_avg"] for state in states], first))
            and all(map(is_, [state["exp_avg_sq"] for state in states], second))
            # of the views too: their storage may have been freed, and its address given out again
            and [*map(_address, self._parameters)] == [*map(_address, self.views)]
            and [*map(Tensor.stride, self._parameters)] == self._strides
            and _lie_with(first, self.exp_avgs)
            and _lie_with(second, self.exp_avg_sqs)
            and [*map(_address, self._steps)] == self._places
        )


def _lie_with(moments: list[Tensor], views: list[Tensor]) -> bool:
    addresses = [*map(_address, moments)]
    return all(addresses) and addresses == [*map(_address, views)]


class Call:
    """One operator call: places in the list of active factors, and their hyperparameters (k, 7)."""

    def __init__(self, positions: list[int], rows: list[list[float]], unknown: Tensor) -> None:
        self.positions = positions
        self.hyperparameters = torch.tensor(rows, dtype=torch.float64, device="cpu")
        self._steps = self.hyperparameters[:, STEP]
        self.rates: list[float] | None = None  # those of the groups, when the learning rates were last written
        self.unknown = unknown  # stands for a coupling that the operator is to compute

    def run(
        self,
        active: list[Slot],
        tensors: Settled,
        gradients: list[Tensor],
        known: dict[int, Tensor],
        rates: list[float],
    ) -> Tensor:
        slots = [active[i] for i in self.positions]
        lists = [tensors.views, gradients, tensors.exp_avgs, tensors.exp_avg_sqs]
        counters = tensors.counters
        if len(slots) < len(active):
            lists = [[each[i] for i in self.positions] for each in lists]
            counters = counters[self.positions]
        if rates != self.rates:
            new = [rates[s.group] for s in slots]
            self.hyperparameters[:, LR] = torch.tensor(new, dtype=torch.float64, device="cpu")
            self.rates = rates
        torch.add(counters, 1, out=self._steps)
        couplings = [known.get(s.index, self.unknown) for s in slots] if known else [self.unknown] * len(slots)
        return torch.ops.stella_kernels.stella_adamw_(*lists, couplings, self.hyperparameters).cpu()

    def overflows(self, active: list[Slot], gradients: list[Tensor], known: dict[int, Tensor]) -> list[Slot]:
        # what no bound clears is tried on copies
        finfo = torch.finfo(self.unknown.dtype)
        peaks = targets.peaks([gradients[i] for i in self.positions])
        moments = [0.0] * len(peaks)
        if finfo.max < 1e5:  # a moment of float16 may be near its limit itself, and little more is too much
            moments = targets.peaks([active[i].exp_avg_sq_view for i in self.positions])
        large = []
        for row, (i, peak, moment) in enumerate(zip(self.positions, peaks, moments, strict=True)):
            slot, gradient = active[i], gradients[i]
            # |∇ − Y ∇ᵀ Y| ≤ (1 + sqrt(n r)) max |∇|, and its square is in range
            if moment > finfo.max / 2 or peak > math.sqrt(finfo.max) / (2.0 + 2.0 * math.sqrt(gradient.numel())):
                copies = [t.clone() for t in (slot.view, slot.exp_avg_view, slot.exp_avg_sq_view)]
                hyperparameters = self.hyperparameters[row : row + 1].clone()
                hyperparameters[:, STEP] = slot.step.item() + 1
                coupling = known.get(slot.index, self.unknown)
                info = torch.ops.stella_kernels.stella_adamw_(
                    copies[:1], [gradient], copies[1:2], copies[2:], [coupling], hyperparameters
                )
                if int(info[0, 0]) == STATUS_OVERFLOW:
                    large.append(slot)
        return large


class Plan:
    """The calls of a step, one for each device and dtype, reused while the same factors have gradients."""

    def __init__(
        self, active: list[Slot], groups: list[int], constants: list[tuple[float, float, float, float]]
    ) -> None:
        self.active, self.groups, self.constants = active, groups, constants
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, slot in enumerate(active):
            kinds.setdefault((slot.view.device, slot.view.dtype), []).append(i)
        parameters = [slot.parameter for slot in active]
        self._shapes, self._strides = [*map(_shape, parameters)], [*map(Tensor.stride, parameters)]
        self._dtypes, self._devices = [*map(_dtype, parameters)], [*map(_device, parameters)]
        self.calls: list[Call] = []
        for positions in kinds.values():
            rows = []
            for i in positions:
                beta1, beta2, eps, sign = constants[groups[i]]
                rows.append([0.0, beta1, beta2, eps, 0.0, active[i].divisor, sign])
            self.calls.append(Call(positions, rows, active[positions[0]].view.new_empty(0)))

    def gradients(self) -> list[Tensor]:
        """The gradients as (n, r): what is usual is asked of all factors at once, of each only where it is not."""
        gradients: list[Any] = [slot.parameter.grad for slot in self.active]
        usual = (
            not torch.compiler.is_compiling()
            and {*map(_layout, gradients)} == {torch.strided}
            and [*map(_shape, gradients)] == self._shapes
            and [*map(_dtype, gradients)] == self._dtypes
            and [*map(_device, gradients)] == self._devices
            and ([*map(Tensor.stride, gradients)] == self._strides or all(map(Tensor.is_contiguous, gradients)))
            and all(map(_address, gradients))
            and not any(map(Tensor.is_neg, gradients))
        )
        if not usual:
            return [slot.gradient() for slot in self.active]
        return [g.mT if slot.factor.transposed else g for slot, g in zip(self.active, gradients, strict=True)]

    def run(self, tensors: Settled, gradients: list[Tensor], known: dict[int, Tensor], rates: list[float]) -> Tensor:
        """Take the step of all; a row of info for each, on the CPU.

        Args:
            tensors: of the active factors.
            gradients: (n, r).
            known: couplings ∇ᵀY, by index of the slot.
            rates: learning rates of the groups.
        """
        infos = [call.run(self.active, tensors, gradients, known, rates) for call in self.calls]
        if len(infos) == 1:
            return infos[0]
        info = torch.empty(len(self.active), INFO_COLUMNS, dtype=torch.float64, device="cpu")
        for call, rows in zip(self.calls, infos, strict=True):
            info[call.positions] = rows
        return info

    def overflows(self, gradients: list[Tensor], known: dict[int, Tensor]) -> list[Slot]:
        """Those whose moments would overflow; nothing is written."""
        return [slot for call in self.calls for slot in call.overflows(self.active, gradients, known)]


def groups_of(model: nn.Module, factors: Sequence[StiefelFactor]) -> list[dict[str, Any]]:
    """The trainable parameters of a model: the constrained ones without weight decay, and the rest."""
    constrained = {id(f.parameter) for f in factors}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in constrained], "weight_decay": 0.0},
        {"params": [p for p in trainable if id(p) not in constrained]},
    ]


def step_free(optimizer: AdamW, group: dict[str, Any], parameters: list[Tensor]) -> None:
    """torch's own AdamW; through its function, since ``super().step()`` would fire the hooks a second time."""
    moving: list[Tensor] = []
    gradients: list[Tensor] = []
    exp_avgs: list[Tensor] = []
    exp_avg_sqs: list[Tensor] = []
    steps: list[Tensor] = []
    has_complex = optimizer._init_group(
        {**group, "params": parameters}, moving, gradients, exp_avgs, exp_avg_sqs, [], steps
    )
    beta1, beta2 = group["betas"]
    adamw(
        moving,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=group["foreach"],
        fused=group["fused"],
        has_complex=has_complex,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )

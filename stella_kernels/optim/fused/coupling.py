"""``K = ∇ᵀY`` of a factor from the gradient of its S: the Riemannian gradient without a pass over the tall factors."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...nn import StiefelFactor
from ...reference.autocast import outside_autocast, without_autocast
from .. import targets

# ‖K − ∇ᵀY‖ allowed, relative to ‖∇‖. An adapter computed in bfloat16 rounds P and Q, hence ∇ and ∂S, by 2⁻⁹ relative,
# and TF32 by 2⁻¹¹: five times the larger. What is added to a gradient and changes K by less, changes the step by less.
TOLERANCE = 1e-2

_CHUNK = 32  # adapters stacked at a time, so that the stacks stay far smaller than the factors


class Couplings:
    """The couplings that adapters U S Vᵀ give for free: ``∇_Uᵀ U = S ∂Sᵀ`` and ``∇_Vᵀ V = Sᵀ ∂S``.

    All gradients of an adapter come from one ``G = Σ y'xᵀ``: ``∇_U = s G V Sᵀ``, ``∂S = s Uᵀ G V``, ``∇_V = s Gᵀ U S``,
    so both are exact, also for sums over micro-batches and uniformly rescaled gradients (clipping by norm, loss
    scaling). They are not where something was added to one of the gradients, or elements of it were clipped, or S has
    moved since: so all are compared with ``∇ᵀY`` at the first step, one in turn at every later step, and the
    direct formula serves all factors in a step where they disagree, with a warning that names those at fault.

    Attributes:
        reasons: for each factor that cannot be coupled, by name, why.
    """

    def __init__(self, factors: Sequence[StiefelFactor], held: Collection[int]) -> None:
        self.reasons: dict[str, str] = {}
        self._names = [f.name for f in factors]
        self._adapters: dict[int, tuple[nn.Parameter, list[tuple[int, bool]]]] = {}  # id of S: S, (factor, is U)
        uses = Counter((id(f.core), f.side) for f in factors)
        for index, factor in enumerate(factors):
            reason = _why_not(factor, held)
            if not reason and uses[id(factor.core), factor.side] > 1:
                reason = "its S serves several adapters, whose gradients are summed"
            if reason:
                self.reasons[factor.name] = reason
            else:
                assert factor.core is not None
                _, sides = self._adapters.setdefault(id(factor.core), (factor.core, []))
                sides.append((index, factor.side == "left"))
        self._check_all = True
        self._turn = 0

    def of_step(self, views: Mapping[int, Tensor], gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """K (r, r) of each factor, by its index, that has one in this step: checked, and empty where a check failed.

        ``views`` and ``gradients``, (n, r), are those of the factors with a gradient, by index.
        """
        known = self._compute(views)
        if not known:
            return known
        self._turn += 1
        indices = list(known)
        checked = indices if self._check_all else [indices[self._turn % len(indices)]]
        wrong = [i for i in checked if _disagrees(known[i], views[i], gradients[i])]
        if wrong and not self._check_all:
            wrong = [i for i in indices if _disagrees(known[i], views[i], gradients[i])]
        self._check_all = bool(wrong)
        if not wrong:
            return known
        warnings.warn(
            f"coupled: the gradients of {', '.join(self._names[i] for i in wrong)} disagree with that of their S "
            f"(‖S ∂Sᵀ − ∇ᵀU‖ or ‖Sᵀ ∂S − ∇ᵀV‖ above {TOLERANCE:g} ‖∇‖), so something other than the adapter, or an "
            "elementwise clipping, changed them, or S moved before this step; the direct formula serves such steps. "
            "Leave that out, or use coupled=False.",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}

    def _compute(self, views: Mapping[int, Tensor]) -> dict[int, Tensor]:
        stacks: dict[tuple[object, ...], list[tuple[nn.Parameter, list[tuple[int, bool]]]]] = {}
        for core, sides in self._adapters.values():
            sides = [side for side in sides if side[0] in views]
            if sides and core.grad is not None and core.grad.layout is torch.strided:
                stacks.setdefault((core.device, core.dtype, core.shape), []).append((core, sides))
        known: dict[int, Tensor] = {}
        for adapters in stacks.values():
            for start in range(0, len(adapters), _CHUNK):
                chunk = adapters[start : start + _CHUNK]
                S = torch.stack([core.detach() for core, _ in chunk])  # (B, r, r)
                grad_S = torch.stack([core.grad for core, _ in chunk if core.grad is not None])
                with without_autocast(S.device):
                    left, right = S @ grad_S.mT, S.mT @ grad_S
                finite = (left.isfinite() & right.isfinite()).flatten(1).all(1).tolist()
                for b, (_, sides) in enumerate(chunk):
                    for index, is_left in sides if finite[b] else ():
                        K = (left if is_left else right)[b]
                        if (K.device, K.dtype) == (views[index].device, views[index].dtype):
                            known[index] = K
        return known


def _why_not(factor: StiefelFactor, held: Collection[int]) -> str:
    """Why the coupling of a factor cannot be had from its S; '' where it can."""
    core, r = factor.core, factor.view.shape[1]
    if core is None:
        return "the module does not say which S it goes with (a bare parameter, or a factor shared by adapters)"
    if core.dim() != 2:
        return "its S is diagonal, and the gradient of the full r x r matrix is needed"
    if tuple(core.shape) != (r, r):
        return f"its S has shape {tuple(core.shape)}, not ({r}, {r})"
    if not core.requires_grad:
        return "its S is frozen, and has no gradient"
    if id(core) not in held:
        return "its S is not in this optimizer, and could move before the factor does"
    if factor.parameter.dtype in targets.HALF_DTYPES or core.dtype != factor.parameter.dtype:
        return f"it is {factor.parameter.dtype} and its S {core.dtype}, wanted both float32 or both float64"
    return ""


@outside_autocast
def _disagrees(K: Tensor, view: Tensor, gradient: Tensor) -> bool:
    norm = float(torch.linalg.norm(gradient))
    if not math.isfinite(norm):
        return False  # the step itself finds it and names it
    return not float(torch.linalg.norm(K - gradient.mT @ view)) <= TOLERANCE * norm

"""Modules with StelLA factors, how factors are initialised, and how an optimizer finds the constrained ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import functional
from .checks import FLOAT_DTYPES, check_choice, check_finite_number, check_whole_number
from .reference.autocast import without_autocast

INITS = ("rando", "svd_major", "svd_minor", "zero", "pseudo_zero", "identity")


@dataclass(frozen=True, eq=False)
class StiefelFactor:
    """One trainable parameter whose (n, r) view is kept on the Stiefel manifold, its columns orthonormal.

    Attributes:
        parameter: the parameter, (n, r), or (r, n) where ``transposed``.
        transposed: whether the parameter is stored as the transpose of the tall factor (Vᵀ is).
        name: the parameter's name in its model; error messages carry it.
        core: the S that this factor multiplies in ``U S Vᵀ``, where the module says; None where it does not.
        side: 'left' for U, 'right' for V; None without a core.
    """

    parameter: nn.Parameter
    transposed: bool
    name: str
    core: nn.Parameter | None = None
    side: str | None = None

    @property
    def view(self) -> Tensor:
        """The factor as (n, r), n >= r: detached, sharing the parameter's memory."""
        value = self.parameter.detach()
        return value.mT if self.transposed else value


# (name within its module, parameter, transposed), and of an adapter U S Vᵀ also S and 'left' or 'right'
OwnFactor = tuple[str, nn.Parameter, bool] | tuple[str, nn.Parameter, bool, nn.Parameter, str]


@runtime_checkable
class HasStiefelFactors(Protocol):
    """A module that owns constrained factors."""

    def own_stiefel_factors(self) -> Iterator[OwnFactor]:
        """Yield (name within this module, parameter, transposed) of each factor that is trained.

        Where it is the U or the V of ``x V Sᵀ Uᵀ`` and nothing else, S and 'left' (U) or 'right' (V) may follow.
        """
        ...


def stiefel_factors(model: nn.Module) -> list[StiefelFactor]:
    """The trainable constrained factors of ``model`` and of every module in it, named as in ``named_parameters``.

    A module takes part by having a method ``own_stiefel_factors()`` that yields (local name, parameter, transposed).
    A parameter shared by several modules is listed once, under the first name, and without a core if they use it with
    different ones. Devices and dtypes are left as they are.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, wanted a torch.nn.Module.")
    found: dict[int, StiefelFactor] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, HasStiefelFactors):
            continue
        for own in module.own_stiefel_factors():
            local_name, parameter, transposed = own[:3]
            name = f"{prefix}.{local_name}" if prefix else local_name
            factor = StiefelFactor(parameter, transposed, name, *own[3:])
            first = found.setdefault(id(parameter), factor)
            if first.core is not factor.core or first.side != factor.side:
                found[id(parameter)] = replace(first, core=None, side=None)
    return list(found.values())


def _random_orthonormal(like: Tensor) -> Tensor:
    """A uniformly distributed (n, r) matrix with orthonormal columns: QR of a Gaussian, R's diagonal made positive."""
    wide = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    Q, R = torch.linalg.qr(torch.randn(like.shape, dtype=wide, device=like.device))
    sign = R.diagonal().sign()
    return Q * torch.where(sign == 0, 1.0, sign)  # without the signs, Q is not uniform (Mezzadri 2007)


@torch.no_grad()
def init_factors(
    U: Tensor,
    S: Tensor,
    Vt: Tensor,
    init: str = "rando",
    base_weight: Tensor | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Fill the factors in place: U and V with orthonormal columns, S with the identity (ones where diagonal) or zero.

    Args:
        U: (m, r), S: (r, r) or (r,), Vt: (r, n); any float dtype, computed in float32 at least.
        init: "rando" (uniform on the Stiefel manifold, from torch's default generator), "svd_major" or "svd_minor" (the
            singular vectors of the base weight with the r largest, or r smallest, singular values), "zero" (U and V as
            in "rando", S zero, so that the adapter starts as nothing), "pseudo_zero" (as "rando": the layer takes away
            the adapter's start, see :class:`StellaLinear`), or "identity" (the first r columns of the identity: no
            randomness, for factors that a checkpoint will fill). All but the last: arXiv 2510.01938, section 5.5.
        base_weight: (m, n), or (n, m) with ``fan_in_fan_out``; needed by the svd ones, left as it is.

    Raises:
        ValueError: unknown init, shapes that do not go together, r above m or n, no base_weight where needed, or one
            that is not finite.
    """
    check_choice("init", init, INITS)
    (m, r), n = U.shape, Vt.shape[1]
    if r > min(m, n) or Vt.shape[0] != r:
        raise ValueError(
            f"U, Vt: found shapes {tuple(U.shape)}, {tuple(Vt.shape)}, wanted (m, r), (r, n) with 1 <= r <= min(m, n)."
        )
    if S.shape not in ((r, r), (r,)):
        raise ValueError(f"S: found shape {tuple(S.shape)}, wanted ({r}, {r}), or ({r},) for a diagonal S.")
    if init in ("rando", "zero", "pseudo_zero"):
        new_U, new_V = _random_orthonormal(U), _random_orthonormal(Vt.mT)
    elif init == "identity":
        new_U, new_V = torch.eye(m, r, device=U.device), torch.eye(n, r, device=Vt.device)
    else:
        new_U, new_V = _singular_vectors(base_weight, m, n, r, init, fan_in_fan_out)
    U.copy_(new_U)
    Vt.copy_(new_V.mT)
    if init == "zero":
        S.zero_()
    else:
        S.copy_(torch.ones_like(S) if S.dim() == 1 else torch.eye(r, dtype=S.dtype, device=S.device))


def _singular_vectors(
    base_weight: Tensor | None, m: int, n: int, r: int, init: str, fan_in_fan_out: bool
) -> tuple[Tensor, Tensor]:
    """(m, r) and (n, r): the singular vectors of the base weight that ``init`` names."""
    if base_weight is None or not base_weight.is_floating_point():
        found = "None" if base_weight is None else f"dtype {base_weight.dtype}"
        raise ValueError(
            f"base_weight: found {found}, wanted the base layer's floating-point weight, which init={init!r} "
            "decomposes; for a quantized base use init='rando'."
        )
    stored = (n, m) if fan_in_fan_out else (m, n)
    if tuple(base_weight.shape) != stored:
        raise ValueError(f"base_weight: found shape {tuple(base_weight.shape)}, wanted {stored}.")
    if not base_weight.is_meta and not bool(base_weight.isfinite().all()):
        raise ValueError(
            f"base_weight: found NaN or an infinity, wanted finite values, which init={init!r} decomposes; load a "
            "sound checkpoint into the base, or use init='rando'."
        )
    weight = base_weight.mT if fan_in_fan_out else base_weight
    left, _, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    chosen = slice(0, r) if init == "svd_major" else slice(min(m, n) - r, min(m, n))
    return left[:, chosen], right[chosen].mT


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
    first, *rest = _joined(terms, min(m, n))
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


class StellaLinear(nn.Module):
    """A frozen linear layer with a trained StelLA adapter: ``base(x) + s · dropout(x) V Sᵀ Uᵀ`` (arXiv 2510.01938).

    S starts as the identity and U, V orthonormal, so the output at the start differs from the base's by s · x V Uᵀ;
    not so with ``init="zero"``, nor with "pseudo_zero". The latter is the paper's start that subtracts s · U S Vᵀ from
    the base weight (arXiv 2510.01938, section 5.5), done here without touching the weight: the layer keeps the first U
    and V as buffers U0 and Vt0 and adds ``−s · x V0 U0ᵀ``. That computes the same function, serves bases of any kind,
    rounds no weight, and is saved with the module; it costs a second adapter's time and memory.
    Train with an optimizer given to ``stella_kernels.optim.attach``, which keeps U and V on their manifolds.

    Args:
        base: ``nn.Linear``, or a module with ``in_features`` and ``out_features`` that maps (..., n) to (..., m); its
            parameters are frozen, and it is kept, not copied, as ``self.base``.
        r: the rank, 1 <= r <= min(m, n).
        alpha: s = alpha / r, or alpha / sqrt(r) with ``use_rslora``. Default: r (so s = 1, or sqrt(r)).
        dropout: probability of dropping an element of the adapter's input while training.
        diag_s: S is diagonal, stored (r,).
        init: how U and V start, see :func:`init_factors`.
        recompute: compute A = dropout(x) V anew in the backward pass instead of keeping its T r elements.
        device: where the factors live; default: where the base's first parameter or buffer is.
        dtype: the factors' dtype. Default float32, whatever the base's: bfloat16 cannot hold orthonormal columns.

    Shapes: U (m, r), S (r, r) or (r,), Vt (r, n). With init="pseudo_zero" also the buffers U0 (m, r) and Vt0 (r, n).

    Raises:
        TypeError: base has no in_features and out_features, r is no int, alpha or dropout no number, dtype no float.
        ValueError: r out of range, alpha not finite, dropout outside [0, 1], unknown init.
    """

    U0: Tensor | None
    Vt0: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        diag_s: bool = False,
        init: str = "rando",
        use_rslora: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        in_features, out_features = getattr(base, "in_features", None), getattr(base, "out_features", None)
        if not isinstance(base, nn.Module) or in_features is None or out_features is None:
            raise TypeError(
                f"base: found {type(base).__name__}, wanted an nn.Linear or a module with in_features and out_features."
            )
        check_whole_number("r", r)
        if r > min(in_features, out_features):
            raise ValueError(
                f"r: found {r}, wanted 1 <= r <= {min(in_features, out_features)} for a layer of {out_features} x "
                f"{in_features}: orthonormal columns need a tall factor."
            )
        if alpha is not None:
            check_finite_number("alpha", alpha)
        check_finite_number("dropout", dropout)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: found {dropout}, wanted a probability in [0, 1].")
        check_choice("init", init, INITS)
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: found {dtype}, wanted torch.float32, float64, bfloat16 or float16.")
        self.in_features, self.out_features, self.r = int(in_features), int(out_features), r
        self.alpha = float(r if alpha is None else alpha)
        self.scale = self.alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = float(dropout)
        self.recompute = recompute
        if device is None:
            device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.U = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.S = nn.Parameter(torch.empty((r,) if diag_s else (r, r), device=device, dtype=dtype))
        self.Vt = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        weight = getattr(base, "weight", None)
        init_factors(self.U, self.S, self.Vt, init, weight if isinstance(weight, Tensor) else None)
        pseudo_zero = init == "pseudo_zero"
        self.register_buffer("U0", self.U.detach().clone() if pseudo_zero else None)
        self.register_buffer("Vt0", self.Vt.detach().clone() if pseudo_zero else None)
        self.base = base.requires_grad_(False)  # last, so that a refused argument leaves the base as it was

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m); see :func:`stella_kernels.functional.stella_linear`."""
        terms: list[Term] = [(self.U, self.S, self.Vt, self.scale, self.dropout if self.training else 0.0)]
        if self.U0 is not None and self.Vt0 is not None:
            terms.append(start_term(self.U0, self.Vt0, self.scale))
        return adapted_output(self.base, x, terms, owned=False, recompute=self.recompute)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s U S Vᵀ, (m, n): a new tensor of the base weight's dtype, computed in float32 at least.

        ``nn.Linear`` with this weight and the base's bias gives what this layer gives in evaluation mode.

        Raises:
            TypeError: the base has no floating-point weight of shape (m, n).
        """
        weight = getattr(self.base, "weight", None)
        wanted = (self.out_features, self.in_features)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != wanted:
            raise TypeError(
                f"base: {type(self.base).__name__} has no floating-point weight of shape {wanted} to merge into; "
                "dequantize it first."
            )
        wide = torch.promote_types(weight.dtype, self.U.dtype)
        core = self.S.diag() if self.S.dim() == 1 else self.S
        with without_autocast(weight.device):
            merged = torch.addmm(weight.to(wide), (self.U @ core).to(wide), self.Vt.to(wide), alpha=self.scale)
            if self.U0 is not None and self.Vt0 is not None:
                merged.addmm_(self.U0.to(wide), self.Vt0.to(wide), alpha=-self.scale)
        return merged.to(weight.dtype)

    def own_stiefel_factors(self) -> Iterator[OwnFactor]:
        """The factors under the constraint that are trained, for :func:`stiefel_factors`."""
        for name, parameter, transposed, side in (("U", self.U, False, "left"), ("Vt", self.Vt, True, "right")):
            if parameter.requires_grad:
                yield name, parameter, transposed, self.S, side

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"
        return (
            f"{shape}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}, diag_s={self.S.dim() == 1}"
        )

"""``StellaLinear``: a linear layer with a StelLA adapter, nothing but torch needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import FLOAT_DTYPES, check_choice, check_finite_number, check_whole_number
from ..reference.autocast import without_autocast
from .adapted import Term, adapted_output, start_term
from .factors import OwnFactor
from .masters import check_stored, master_after_apply, start_fits
from .starts import INITS, init_factors, restart_factors


class StellaLinear(nn.Module):
    """A frozen linear layer with a trained StelLA adapter: ``base(x) + s · dropout(x) V Sᵀ Uᵀ`` (arXiv 2510.01938).

    S starts as the identity and U, V orthonormal, so the output at the start differs from the base's by s · x V Uᵀ;
    not so with ``init="zero"``, nor with "pseudo_zero". The latter is the paper's start that subtracts s · U S Vᵀ from
    the base weight (arXiv 2510.01938, section 5.5), done here without touching the weight: the layer keeps the first U
    and V as buffers U0 and Vt0 and adds ``−s · x V0 U0ᵀ``. That computes the same function, serves bases of any kind,
    rounds no weight, and is saved with the module; it costs a second adapter's time and memory. A state dict that is
    loaded decides: U0 and Vt0 are taken over from it, and dropped where it has none.
    Train with an optimizer given to ``stella_kernels.optim.attach``, which keeps U and V on their manifolds.

    There is no ``weight``: a parent that reads it and never calls the layer (nn.MultiheadAttention's ``out_proj``)
    would train nothing, and gets an AttributeError that says so.

    Args:
        base: ``nn.Linear``, or a module with ``in_features`` and ``out_features`` that maps (..., n) to (..., m); its
            parameters are frozen, and it is kept, not copied, as ``self.base``.
        r: the rank, 1 <= r <= min(m, n).
        alpha: s = alpha / r, or alpha / sqrt(r) with ``use_rslora``. Default: r (so s = 1, or sqrt(r)).
        dropout: probability of dropping an element of the adapter's input while training.
        diag_s: S is diagonal, stored (r,).
        init: how U and V start, see `init_factors`.
        use_rslora: s = alpha / sqrt(r).
        recompute: compute A = dropout(x) V anew in the backward pass instead of keeping its T r elements.
        device: where the factors live; default: where the base's first parameter or buffer is.
        dtype: the factors' dtype. Default float32, whatever the base's: bfloat16 cannot hold orthonormal columns. It is
            a promise that ``layer.to(dtype)`` changes and a cast of ``.data`` breaks, see `lost_masters`.

    Shapes: U (m, r), S (r, r) or (r,), Vt (r, n). With init="pseudo_zero" also the buffers U0 (m, r) and Vt0 (r, n).

    Raises:
        TypeError: base has no in_features and out_features, r is no int, alpha or dropout no number, dtype no float.
        ValueError: r out of range, alpha not finite, dropout outside [0, 1], unknown init.
    """

    U0: Tensor | None
    Vt0: Tensor | None
    _master: torch.dtype = torch.float32  # what the factors were made with, or cast to by choice

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
        self.init = init
        pseudo_zero = init == "pseudo_zero"
        self.register_buffer("U0", self.U.detach().clone() if pseudo_zero else None)
        self.register_buffer("Vt0", self.Vt.detach().clone() if pseudo_zero else None)
        self._master = dtype
        self.base = base.requires_grad_(False)  # last, so that a refused argument leaves the base as it was

    def reset_parameters(self) -> None:
        """Start the factors anew, as ``init`` says: after ``to_empty`` of a layer that was made on the meta device.

        Sharded factors start alike on every process, from the random state of the mesh's first; all have to call it.
        """
        weight = getattr(self.base, "weight", None)
        U, Vt = restart_factors(self.U, self.S, self.Vt, self.init, weight if isinstance(weight, Tensor) else None)
        if self.init == "pseudo_zero":
            self.U0, self.Vt0 = U, Vt

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m); see `stella_kernels.functional.stella_linear`."""
        # by the module's dictionaries, where they are as a rule: its attributes take a tenth of the host's time
        own, buffers = self._parameters, self._buffers
        U, S, Vt = (own.get("U"), own.get("S"), own.get("Vt"))
        if U is None or S is None or Vt is None:  # parametrized, or flattened by an engine
            U, S, Vt = self.U, self.S, self.Vt
        terms: list[Term] = [(U, S, Vt, self.scale, self.dropout if self.training else 0.0)]
        base: Any = self._modules["base"]
        U0, Vt0 = buffers.get("U0"), buffers.get("Vt0")
        if U0 is not None and Vt0 is not None:
            terms.append(start_term(U0, Vt0, self.scale))
        return adapted_output(base, x, terms, owned=False, recompute=self.recompute)

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
        """The factors under the constraint that are trained, for `stiefel_factors`."""
        return (own for own in self.every_stiefel_factor() if own[1].requires_grad)

    def every_stiefel_factor(self) -> Iterator[OwnFactor]:
        """The factors under the constraint, frozen ones too."""
        yield "U", self.U, False, self.S, "left", self._master
        yield "Vt", self.Vt, True, self.S, "right", self._master

    def _apply(self, fn: Any, recurse: bool = True) -> StellaLinear:
        before = self.U.dtype
        super()._apply(fn, recurse)
        self._master = master_after_apply(self.U, before, self._master, fn)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._take_start_from(state_dict, prefix, error_msgs)
        for name, side in (("U", "columns"), ("S", None), ("Vt", "rows"), ("U0", "columns"), ("Vt0", "rows")):
            if (own := getattr(self, name)) is not None:
                check_stored(state_dict, prefix + name, own, side, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_start_from(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        """Have the buffers of 'pseudo_zero' where the state dict has them, and none where it has none."""
        stored = [name for name in ("U0", "Vt0") if prefix + name in state_dict]
        if len(stored) == 1:
            error_msgs.append(f"{prefix}{stored[0]}: found without its partner, wanted both of U0 and Vt0 or neither.")
        elif stored and self.U0 is None:
            wanted = {f"{prefix}U0": self.U.detach(), f"{prefix}Vt0": self.Vt.detach()}
            if start_fits(state_dict, wanted, error_msgs):
                self.U0, self.Vt0 = self.U.detach().clone(), self.Vt.detach().clone()
        elif not stored and prefix + "U" in state_dict:  # a state dict that is not about this layer decides nothing
            self.U0 = self.Vt0 = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "'StellaLinear' has no attribute 'weight': what reads the weight of this layer instead of calling it "
                "(nn.MultiheadAttention its out_proj; nn.TransformerEncoderLayer linear1 and linear2 in evaluation, "
                "unless torch.backends.mha.set_fastpath_enabled(False)) would leave the adapter out. Adapt another "
                "layer, or use merged_weight(), or base.weight for the base layer's."
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"
        return (
            f"{shape}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}, diag_s={self.S.dim() == 1}"
        )

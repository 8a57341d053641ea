"""The one definition of every operator's arguments: a dataclass for each, its fields in their order.

From these come the schemas that torch is told, the argument that each Python implementation takes (fallback, fake,
Triton, the emulated ARM of the tests) and, while the CPU library is built, a C++ header
(``csrc/cpu/torch/generate_signatures.py``). Nothing is imported here that a build would not have.

Operators over many factors take tensor lists, each tensor seen as (n, r): a factor stored transposed, (r, n), comes as
its ``.mT`` view and is never copied to transpose it. They return ``info`` (``status.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN = {"written": True}  # the metadata of an argument that is written in place

_SCHEMA_TYPES = {
    "Tensor": "Tensor{}",
    "Tensor | None": "Tensor{}?",
    "list[Tensor]": "Tensor{}[]",
    "str": "str",
    "float": "float",
    "bool": "bool",
    "list[float]": "float[]",
    "list[bool]": "bool[]",
}


class Signature:
    """Base of all: the operator's name and how many tensors it returns."""

    name: ClassVar[str]
    returns: ClassVar[int] = 1

    @classmethod
    def arguments(cls) -> dict[str, str]:
        """Name -> type, as written below."""
        return {each.name: str(each.type) for each in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def schema(cls) -> str:
        """What ``torch.library.define`` takes."""
        letters = iter("abcdefgh")
        terms = []
        for each in fields(cls):  # type: ignore[arg-type]
            alias = f"({next(letters)}!)" if each.metadata.get("written") else ""
            terms.append(f"{_SCHEMA_TYPES[str(each.type)].format(alias)} {each.name}")
        result = "Tensor" if cls.returns == 1 else f"({', '.join(['Tensor'] * cls.returns)})"
        return f"{cls.name}({', '.join(terms)}) -> {result}"


S = TypeVar("S", bound=Signature)


def positional(signature: type[S], implementation: Callable[[S], Any]) -> Callable[..., Any]:
    """``implementation`` as torch calls it: with the arguments one by one."""

    def serve(*arguments: Any) -> Any:
        return implementation(signature(*arguments))

    serve.__name__ = serve.__qualname__ = signature.name
    serve.__doc__ = implementation.__doc__
    return serve


@dataclass(frozen=True, slots=True)
class Polar(Signature):
    """The orthogonal polar factor of each matrix of M (..., n, r), and its info."""

    name: ClassVar[str] = "polar"
    returns: ClassVar[int] = 2
    M: Tensor
    method: str


@dataclass(frozen=True, slots=True)
class RiemannianGradient(Signature):
    """∇ ← ∇ − Y ∇ᵀ Y in place; each factor is copied to its snapshot, where there are any.

    Nothing at all is written when a gradient is non-finite (status 1), or its Riemannian gradient would be, or what it
    is computed from (status 3: overflow). Left alone, with the others written: the gradient of a factor that is not
    finite itself (1), and one that overflows because its factor is off the manifold by a drift of more than 3 (3).
    """

    name: ClassVar[str] = "riemannian_gradient_"
    gradients: list[Tensor] = field(metadata=WRITTEN)
    factors: list[Tensor]
    snapshots: list[Tensor] = field(metadata=WRITTEN)


@dataclass(frozen=True, slots=True)
class ProjectRetract(Signature):
    """moved ← uf(Y + Δ) in place, Δ the tangent projection at Y = previous of (moved − previous) / divisor."""

    name: ClassVar[str] = "project_retract_"
    moved: list[Tensor] = field(metadata=WRITTEN)
    previous: list[Tensor]
    divisors: list[float]
    method: str


@dataclass(frozen=True, slots=True)
class StellaAdamWStep(Signature):
    """The whole AdamW step of constrained factors, in place.

    A row of hyperparameters, (k, 7) float64 on the CPU: lr, β₁, β₂, eps, step t (this one counted), divisor of the
    gradient scaling, sign (−1 to maximize). couplings[i] is K = ∇ᵀY (r, r), float64 or float32, or has no elements
    where it is to be computed. Nothing at all is written, and every residual is NaN, where a gradient is not finite
    (status 1) or so large that a moment would overflow, the square of its Riemannian gradient above all (status 3).
    Status 1 beside a finite gradient: the factor, a moment or the move is not finite; this factor is not moved, its
    moments may have been advanced, and the others have taken their steps.
    """

    name: ClassVar[str] = "stella_adamw_"
    factors: list[Tensor] = field(metadata=WRITTEN)
    gradients: list[Tensor]
    exp_avgs: list[Tensor] = field(metadata=WRITTEN)
    exp_avg_sqs: list[Tensor] = field(metadata=WRITTEN)
    couplings: list[Tensor]
    hyperparameters: Tensor


# The phases of a step over factors whose rows are spread over processes (docs/design.md 3.6). Each process calls them
# with its own rows of every factor, (n_i, r), any n_i, none too, and adds up what ``sums`` and ``grams`` hold over the
# processes in between. Both are flat and of the arithmetic's dtype, for one factor after another:
#
#     sums    K = ∇ᵀY (r, r), the upper triangle of C = YᵀY by rows, and a bound on ‖∇‖_F
#     grams   A = YᵀΔ (r, r), and the upper triangle of D = ΔᵀΔ by rows
#
# The sum of the processes' bounds is one of all rows: finite wherever every gradient is (at most 1e30 each), and NaN
# where one is not. What may be wrong (values that are not finite, overflow, drift) is for the caller to see in
# ``sums``, before anything is written.


@dataclass(frozen=True, slots=True)
class GradientGram(Signature):
    """``sums`` of these rows."""

    name: ClassVar[str] = "gradient_gram"
    gradients: list[Tensor]
    factors: list[Tensor]


@dataclass(frozen=True, slots=True)
class RiemannianGradientRows(Signature):
    """∇ ← ∇ − Y K in place; each factor is copied to its snapshot, where there are any. Returns (0,)."""

    name: ClassVar[str] = "riemannian_gradient_rows_"
    gradients: list[Tensor] = field(metadata=WRITTEN)
    factors: list[Tensor]
    snapshots: list[Tensor] = field(metadata=WRITTEN)
    sums: Tensor


@dataclass(frozen=True, slots=True)
class RetractGram(Signature):
    """``grams`` of these rows, Δ = (moved − previous) / divisor."""

    name: ClassVar[str] = "retract_gram"
    moved: list[Tensor]
    previous: list[Tensor]
    divisors: list[float]


@dataclass(frozen=True, slots=True)
class RetractRows(Signature):
    """moved ← uf(Y + Δ) in place, Y = previous, of all rows of a factor, of which these are some; info.

    A step that is too long for its round-off to be bounded has a large residual: a retraction of what was stored then
    takes it to round-off. Status 2, and nothing written of that factor: Y + Δ is rank deficient to working precision.
    """

    name: ClassVar[str] = "retract_rows_"
    moved: list[Tensor] = field(metadata=WRITTEN)
    previous: list[Tensor]
    divisors: list[float]
    sums: Tensor
    grams: Tensor


@dataclass(frozen=True, slots=True)
class AdamWGram(Signature):
    """The moments are advanced in place, as stella_adamw_ does; ``grams`` of the steps Δ, and the steps themselves.

    The steps are of the arithmetic's dtype, and laid out as the implementation likes, one factor after another.
    """

    name: ClassVar[str] = "adamw_gram_"
    returns: ClassVar[int] = 2
    factors: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor] = field(metadata=WRITTEN)
    exp_avg_sqs: list[Tensor] = field(metadata=WRITTEN)
    sums: Tensor
    hyperparameters: Tensor


@dataclass(frozen=True, slots=True)
class AdamWRows(Signature):
    """Y ← uf(Y + Δ') in place, Δ' the tangent projection of the steps of ``adamw_gram_``; info as of retract_rows_."""

    name: ClassVar[str] = "adamw_rows_"
    factors: list[Tensor] = field(metadata=WRITTEN)
    steps: Tensor
    sums: Tensor
    grams: Tensor


# The adapter. Everything is computed in y's dtype (the base layer's, so autocast's inside autocast): x and the factors
# are cast to it where they differ, and the factors' gradients return in the factors' own dtype. y, x and grad_x are
# (T, m), (T, n) and (T, n). The seed is an int64 scalar on x's device, None when p is 0.


@dataclass(frozen=True, slots=True)
class PhiloxDropout(Signature):
    """x / (1 − p) where the mask of ``seed`` keeps it, else 0: a new contiguous tensor of x's shape."""

    name: ClassVar[str] = "philox_dropout"
    x: Tensor
    p: float
    seed: Tensor


@dataclass(frozen=True, slots=True)
class AdapterForward(Signature):
    """y += s d(x) V Sᵀ Uᵀ in place; returns A = d(x) V, (T, r)."""

    name: ClassVar[str] = "adapter_forward_"
    y: Tensor = field(metadata=WRITTEN)
    x: Tensor
    U: Tensor
    S: Tensor
    Vt: Tensor
    scale: float
    p: float
    seed: Tensor | None


@dataclass(frozen=True, slots=True)
class AdapterProduct(Signature):
    """The same where nothing is there to add to: y = b + s d(x) V Sᵀ Uᵀ in x's dtype, and A.

    A base product that accumulates into y may follow, which spares reading and writing y once more.
    """

    name: ClassVar[str] = "adapter_product"
    returns: ClassVar[int] = 2
    x: Tensor
    b: Tensor | None
    U: Tensor
    S: Tensor
    Vt: Tensor
    scale: float
    p: float
    seed: Tensor | None


@dataclass(frozen=True, slots=True)
class AdapterBackward(Signature):
    """grad_x = beta grad_x + dᵀ(K Vᵀ) in place; returns ∂U, ∂S, ∂Vᵀ, each of shape (0,) where ``needed`` says no."""

    name: ClassVar[str] = "adapter_backward_"
    returns: ClassVar[int] = 3
    grad_x: Tensor | None = field(metadata=WRITTEN)
    beta: float
    grad_y: Tensor
    x: Tensor
    A: Tensor
    U: Tensor
    S: Tensor
    Vt: Tensor
    scale: float
    p: float
    seed: Tensor | None
    needed: list[bool]


SIGNATURES: tuple[type[Signature], ...] = (
    *(Polar, RiemannianGradient, ProjectRetract, StellaAdamWStep),
    *(PhiloxDropout, AdapterForward, AdapterProduct, AdapterBackward),
)
OPERATORS = tuple(signature.name for signature in SIGNATURES)
PHASES: tuple[type[Signature], ...] = (
    *(GradientGram, RiemannianGradientRows, RetractGram, RetractRows, AdamWGram, AdamWRows),
)

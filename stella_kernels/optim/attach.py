"""Turns any torch optimizer into a Riemannian one: hooks before and after its step."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from ..checks import METHODS, check_choice
from ..nn import StiefelFactor
from ..reference import stiefel
from . import guard, targets
from .adamw import StellaAdamW
from .attachment import Attachment, Settings, attachments_of
from .quotient import find_products
from .wrappers import hooked_optimizers

GEOMETRIES = ("stiefel", "euclidean", "quotient")


def attach(
    optimizer: Optimizer,
    target: nn.Module | Iterable[StiefelFactor | nn.Parameter],
    *,
    retraction: str = "polar",
    grad_scaling: bool | float = True,
    geometry: str = "stiefel",
    method: str = "auto",
    on_foreign_move: str = "error",
) -> Attachment:
    """Keep factors on the Stiefel manifold while ``optimizer`` trains them: the StelLA step (arXiv 2510.01938).

    From now on each ``optimizer.step()``, for each factor Y (n, r) that has a gradient ∇:
    turns it into the Riemannian ``∇ − Y ∇ᵀ Y`` before the optimizer sees it, and afterwards takes the optimizer's
    move, divided by ``sqrt(n / d)`` and projected to the tangent space at Y, as the step to retract.
    The rewritten ``.grad`` stays until it is zeroed. The optimizer's ``state_dict`` is unaffected; hooks are not saved
    with it, so attach again after loading. A copied or unpickled optimizer is attached to the copies of its factors.

    A factor that something else has moved since its last retraction is found as the next step begins (``optim.guard``).
    Factors of the model that move later (unfrozen, added to a group, frozen with a gradient left) are constrained from
    then on. A step checks the gradients of all groups and attachments before it rewrites any.

    Args:
        optimizer: any torch optimizer, or a wrapper around one. Constrained factors go in groups without weight decay.
            ``step(closure)`` may evaluate its closure once, before anything moves.
        target: a model with StelLA adapters (all its trainable factors are taken), or a sequence of ``StiefelFactor``
            or of tall parameters (n, r), n > r. float32 or float64; bfloat16 and float16 work at their own precision.
            Any devices; sharded parameters (DTensor, of fully_shard) take retraction 'polar' and method 'auto'.
        retraction: 'polar' (a native kernel), 'qr', 'exp_map' or 'cayley' (plain PyTorch; the last two keep the drift
            of a factor, and take the orthogonal polar factor where it has grown past round-off).
        grad_scaling: True takes d from the model's ``config.hidden_size``, a number is d itself, False is no scaling.
        geometry: 'stiefel'; or, for the paper's ablations, 'euclidean' without constraint, which leaves the optimizer
            as it is, or 'quotient': U, S and V of a module move together, horizontally to the fibres on which U S Vᵀ is
            constant, in R3MC's metric (see ``optim.quotient``; in plain PyTorch, S full and held by the optimizer).
            The paper used no gradient scaling with either.
        method: of the polar factor, 'auto', 'newton_schulz' or 'svd'.
        on_foreign_move: what to do with a factor that was found off its manifold as a step began: 'error', or 'retract'
            to go on from its orthogonal polar factor, for training that averages or interpolates weights.

    Raises:
        TypeError: an argument of the wrong type, or a factor whose dtype is not floating.
        ValueError: a choice that does not exist, a wide or batched factor, a factor that is not orthonormal, is not in
            the optimizer, has weight decay or is attached already, an unknown hidden size.
        NonFiniteError: a factor holds NaN or an infinity.

    ``optimizer.step()`` then raises, with nothing changed, ``ValueError`` for weight decay set since, for factors that
    the optimizer no longer holds, that the model has replaced, or that alone train and are in no optimizer,
    ``RuntimeError`` for a sparse or expanded gradient or where none has one in three steps,
    ``OffManifoldError`` for a factor that something else moved (where only ``.data`` was written, the gradients have
    been rewritten by then), ``NonFiniteError`` for a NaN or infinite gradient of a factor or of its S, or value. If the
    optimizer
    moves a factor to NaN, or a retraction fails, all factors go back to their values before the step
    and ``NonFiniteError`` or ``RuntimeError`` names those at fault.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: found {type(optimizer).__name__}, wanted a torch.optim.Optimizer.")
    optimizers = hooked_optimizers(optimizer)
    optimizer = optimizers[0]
    check_choice("retraction", retraction, tuple(stiefel.RETRACTIONS))
    check_choice("geometry", geometry, GEOMETRIES)
    check_choice("method", method, METHODS)
    check_choice("on_foreign_move", on_foreign_move, guard.POLICIES)
    factors = targets.resolve_factors(target)
    targets.refuse_sharded(
        factors, retraction=(retraction, "polar"), geometry=(geometry, "stiefel"), method=(method, "auto")
    )
    hidden_size: float | None = None
    if grad_scaling is True:
        hidden_size = targets.hidden_size_of(target) if geometry != "euclidean" else None
    elif grad_scaling is not False:
        hidden_size = targets.check_hidden_size("grad_scaling", grad_scaling)
    targets.check_shapes(factors)
    targets.check_masters(factors)
    products = find_products(factors) if geometry == "quotient" else []
    targets.check_held(optimizer, [*factors, *(StiefelFactor(p.core, False, p.core_name) for p in products)])
    attached = {id(f.parameter) for one in optimizers for a in attachments_of(one) for f in a.factors}
    twice = [f.name for f in factors if id(f.parameter) in attached]
    if twice:
        raise ValueError(
            f"target: {', '.join(twice)} already attached to this optimizer, which would retract twice a step; "
            "call .remove() on the first attachment before attaching again."
        )
    for one in optimizers:
        own = {id(f.parameter) for f in one.factors} if isinstance(one, StellaAdamW) else set()
        twice = [f.name for f in factors if id(f.parameter) in own]
        if twice:
            raise ValueError(
                f"target: {', '.join(twice)} already constrained by this StellaAdamW, which retracts by itself; use it "
                "without attach, or attach to a torch.optim.AdamW."
            )
    if geometry != "euclidean":
        targets.check_orthonormal(factors)
        targets.check_no_weight_decay(optimizer, {id(f.parameter): f.name for f in factors})
    settings = Settings(retraction, hidden_size, geometry, method, on_foreign_move)
    return Attachment(optimizers, target, factors, settings, products)

"""Training with transformers: a Trainer, its mixin for other trainers, and a callback, all around ``optim.attach``."""

from __future__ import annotations

import os
import warnings
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..diagnostics import Recorder, describe_off, off_manifold
from ..nn import lost_masters, missing_factors_advice, stiefel_factors
from ..optim import StellaAdamW, attach, targets
from ..optim.attachment import Attachment
from ..optim.wrappers import hooked_optimizers
from .config import StellaConfig
from .layer import StellaLayer


def adapter_settings(model: nn.Module) -> tuple[str, bool | float, str]:
    """(retraction, gradient scaling, geometry) that the active StelLA adapters of ``model`` are configured with.

    Raises:
        ValueError: there is no active StelLA adapter, or two disagree: an optimizer has one geometry.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    layers = [module for module in model.modules() if isinstance(module, StellaLayer)]
    active = sorted({name for layer in layers for name in layer.active_adapters if name in layer.r})
    active = [name for name in active if isinstance(configs.get(name), StellaConfig)]
    if not active:
        raise ValueError(
            "model: found no active StelLA adapter, wanted a model from get_peft_model(model, StellaConfig(...))."
        )
    fields = ("stella_retraction", "stella_grad_scaling", "stella_geometry")
    settings = {name: tuple(getattr(configs[name], field) for field in fields) for name in active}
    if len(set(settings.values())) > 1:
        raise ValueError(
            f"model: active adapters disagree on ({', '.join(fields)}): {settings}; train them one after the other, "
            "or configure them alike."
        )
    retraction, grad_scaling, geometry = settings[active[0]]
    return retraction, grad_scaling, geometry


def subspaces_are_frozen(model: nn.Module) -> bool:
    """Whether every active StelLA adapter trains its S alone, so that there is no geometry to keep."""
    adapter_settings(model)
    layers = [module for module in model.modules() if isinstance(module, StellaLayer)]
    active = {name for layer in layers for name in layer.active_adapters if name in layer.r}
    configs: Any = getattr(model, "peft_config", {})
    return all(configs[name].stella_frozen_subspaces for name in active if isinstance(configs.get(name), StellaConfig))


def check_trainable(model: nn.Module) -> None:
    """Raise unless the active adapters' factors can be trained as they are.

    Raises:
        ValueError: none is trainable, or some are in a narrower dtype than the float32 they were made in. Not of an
            adapter whose subspaces are frozen by its configuration.
    """
    if subspaces_are_frozen(model):
        return
    factors = stiefel_factors(model)
    if not factors:
        adapter_settings(model)  # no active adapter at all is said there
        raise ValueError(
            f"model: found no trainable StelLA factor in {type(model).__name__}; {missing_factors_advice(model)}."
        )
    lost = set(lost_masters(factors))
    narrow = [factor for factor in factors if factor.name in lost]
    if narrow:
        first = narrow[0]
        raise ValueError(
            f"{first.name}: found {first.parameter.dtype}, made as a {first.master} master, as are {len(narrow)} of "
            f"{len(factors)} factors: something cast the trainable parameters, as TRL does for a quantized model. Most "
            "updates would round to nothing. Call stella_kernels.nn.restore_masters(model) after it, before training."
        )


def _hidden_size(model: nn.Module) -> float:
    try:
        return targets.hidden_size_of(model)
    except ValueError as error:
        base: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
        config = getattr(base, "config", None)
        if getattr(config, "hidden_size", None) is not None:
            raise  # it is there, and the message says what is wrong with it
        raise ValueError(
            f"stella_grad_scaling: True takes the model's hidden size, and {type(base).__name__} has no "
            "config.hidden_size; configure the adapter with StellaConfig(stella_grad_scaling=d), d being the width of "
            "the model, or stella_grad_scaling=False to leave the steps unscaled. Of an adapter that exists: "
            "model.peft_config[name].stella_grad_scaling = d."
        ) from error


def retracts_by_itself(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether there is nothing to attach: ``optimizer`` is a ``StellaAdamW`` that constrains all trainable factors of
    ``model``, or the adapter trains none.

    Raises:
        ValueError: it does, but not with the retraction, geometry and scaling of the adapter's configuration.
    """
    if subspaces_are_frozen(model):
        return True
    inner = next((one for one in hooked_optimizers(optimizer) if isinstance(one, StellaAdamW)), None)
    if inner is None:
        return False
    check_trainable(model)
    own = {id(factor.parameter) for factor in inner.factors}
    if not all(id(factor.parameter) in own for factor in stiefel_factors(model)):
        return False  # attach says which factors are held by what
    retraction, scaling, geometry = adapter_settings(model)
    if (retraction, geometry) != ("polar", "stiefel"):
        raise ValueError(
            f"optimizer: found a StellaAdamW for an adapter configured with stella_retraction={retraction!r} and "
            f"stella_geometry={geometry!r}, wanted 'polar' and 'stiefel', which it fuses; train with torch.optim.AdamW "
            "instead, or configure the adapter so."
        )
    wanted = _hidden_size(model) if scaling is True else None if scaling is False else float(scaling)
    if inner.hidden_size != wanted:
        raise ValueError(
            f"optimizer: found a StellaAdamW that scales by width {inner.hidden_size}, wanted {wanted}, of the "
            f"adapter's stella_grad_scaling={scaling!r}; give both the same, StellaAdamW(grad_scaling={scaling!r})."
        )
    return True


def attach_adapter(optimizer: torch.optim.Optimizer, model: nn.Module) -> Attachment:
    """``optim.attach(optimizer, model, …)`` with what the adapter's configuration says of geometry.

    Args:
        optimizer: any torch optimizer over the model's trainable parameters, also wrapped by Accelerate.
        model: the PEFT model.

    Raises:
        ValueError: see ``adapter_settings``, ``check_trainable`` and ``optim.attach`` (weight decay on a constrained
            factor, among others).
    """
    retraction, grad_scaling, geometry = adapter_settings(model)
    check_trainable(model)
    if grad_scaling is True and geometry != "euclidean":
        grad_scaling = _hidden_size(model)
    return attach(optimizer, model, retraction=retraction, grad_scaling=grad_scaling, geometry=geometry)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups of the trainable parameters of ``model``: the constrained factors without weight decay, and
    the rest with ``weight_decay``. For an optimizer of one's own: ``AdamW(parameter_groups(model, 0.01), lr=…)``.
    """
    constrained = {id(factor.parameter) for factor in stiefel_factors(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in constrained], "weight_decay": 0.0},
        {"params": [p for p in trainable if id(p) not in constrained], "weight_decay": weight_decay},
    ]


def _off_after_training(model: nn.Module) -> str | None:
    """What to say of factors that are off the manifold after their last step; None where all is well."""
    if not stiefel_factors(model):
        return None
    if adapter_settings(model)[2] == "euclidean":
        return None
    errors = off_manifold(model)
    return describe_off(errors) if errors else None


def _warn_if_off(model: nn.Module, when: str) -> None:
    if (fault := _off_after_training(model)) is not None:
        warnings.warn(f"model: {when}, {fault}.", RuntimeWarning, stacklevel=3)


def _refuse_engines(trainer: Any) -> None:
    """Raise ``NotImplementedError`` for engines that flatten factors, or step on copies of them."""
    found = ""
    if getattr(trainer, "is_deepspeed_enabled", False):
        found = "DeepSpeed, whose optimizers step on flattened copies of the factors"
    elif getattr(trainer, "is_fsdp_enabled", False):
        plugin = getattr(getattr(trainer, "accelerator", None), "state", None)
        plugin = getattr(plugin, "fsdp_plugin", None)
        if getattr(plugin, "fsdp_version", 1) != 2:
            found = "FSDP's first version, which flattens the parameters of a layer into one"
    if found:
        raise NotImplementedError(
            f"StellaTrainer: found {found}, wanted FSDP2 (fsdp_version: 2 in the configuration of Accelerate, or in "
            "fsdp_config), distributed data parallel training, or one device."
        )


class StellaTrainerMixin:
    """Mix in before any ``Trainer``: ``class MyTrainer(StellaTrainerMixin, SFTTrainer): ...``.

    ``U`` and ``V`` take no weight decay, and the optimizer keeps them on their manifolds with the retraction and
    gradient scaling of the adapter's configuration. Works with transformers 4 and 5. A ``StellaAdamW`` over the model,
    ``optimizers=(StellaAdamW(model, ...), None)``, retracts by itself and gets nothing attached.

    Factors that left the manifold after their last step (a callback that averages weights, say) are warned of when
    training ends and when a checkpoint is written, and ``save_model`` refuses to write a final model with them.
    """

    attachment: Attachment | None = None
    _attached_to: torch.optim.Optimizer | None = None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names that weight decay applies to: the Trainer's own, without the constrained factors."""
        constrained = {factor.name for factor in stiefel_factors(model)}
        return [name for name in super().get_decay_parameter_names(model) if name not in constrained]  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as the Trainer does and attach the geometry to it, once.

        Raises:
            NotImplementedError: under FSDP's first version or DeepSpeed.
            ValueError: see ``check_trainable`` and ``attach_adapter``.
        """
        _refuse_engines(self)
        model: nn.Module = self.model  # type: ignore[attr-defined]
        check_trainable(model)
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        inner = hooked_optimizers(optimizer)[0]
        if inner is not self._attached_to:
            if self.attachment is not None:
                self.attachment.remove()
            self.attachment = None if retracts_by_itself(inner, model) else attach_adapter(inner, model)
            self._attached_to = inner
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; then ``RuntimeWarning`` if factors are off the manifold when all callbacks have run."""
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        _warn_if_off(self.model, "after training")  # type: ignore[attr-defined]
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's own, after a look at the factors. A checkpoint is written all the same, with a warning.

        Raises:
            ValueError: factors of a model saved by the caller are off the manifold; nothing was written.
        """
        model: nn.Module = self.model  # type: ignore[attr-defined]
        if _internal_call:
            _warn_if_off(model, "in the checkpoint that is being written")
        elif (fault := _off_after_training(model)) is not None:
            raise ValueError(f"model: {fault}. Or model.save_pretrained(...) writes it as it is; nothing was saved.")
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]


class StellaTrainer(StellaTrainerMixin, Trainer):
    """``transformers.Trainer`` for StelLA adapters; see ``StellaTrainerMixin``. Checkpoints resume as usual."""


class StellaCallback(TrainerCallback):
    """Geometry for a Trainer of one's own: ``Trainer(..., callbacks=[StellaCallback()])``.

    Attached when training begins and removed when it ends. A callback sees the optimizer only after its groups are
    fixed (a checkpoint would not resume if they moved), so weight decay on ``U`` and ``V`` is an error that says what
    to do, never changed behind the caller's back.
    """

    def __init__(self) -> None:
        self.attachment: Attachment | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer that the Trainer hands to callbacks.

        Raises:
            ValueError: a constrained factor is in a parameter group with weight decay, or see ``attach_adapter``.
        """
        check_trainable(kwargs["model"])
        model, optimizer = kwargs["model"], hooked_optimizers(kwargs["optimizer"])[0]
        names = {id(factor.parameter): factor.name for factor in stiefel_factors(model)}
        for group in optimizer.param_groups:
            decayed = [names[id(p)] for p in group["params"] if id(p) in names]
            if decayed and group.get("weight_decay", 0.0) != 0.0:
                raise ValueError(
                    f"weight_decay: found {group['weight_decay']} on {len(decayed)} constrained factors (the first is "
                    f"{decayed[0]!r}), wanted 0. Use StellaTrainer (or StellaTrainerMixin on your own Trainer), which "
                    "exempts them; or pass optimizers=(AdamW(stella_kernels.peft.parameter_groups(model, "
                    "weight_decay=...), lr=...), None) to your Trainer; or train with weight_decay=0."
                )
        self._detach()
        self.attachment = None if retracts_by_itself(optimizer, model) else attach_adapter(optimizer, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was found. ``RuntimeWarning`` if factors are off the manifold."""
        self._detach()
        _warn_if_off(kwargs["model"], "after training")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """``RuntimeWarning`` if factors are off the manifold in the checkpoint that was just written."""
        _warn_if_off(kwargs["model"], "in the checkpoint that was just written")

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.remove()
            self.attachment = None


class DiagnosticsCallback(TrainerCallback):
    """Records how orthonormal the factors are and how far they have turned: ``callbacks=[DiagnosticsCallback()]``.

    Args:
        every: record after each this many steps; the start of training and its end are always recorded.
        plot: where to write the figure when training ends; None for no figure (``recorder.plot(path)`` draws it later).

    Attributes:
        recorder: a ``stella_kernels.diagnostics.Recorder``, of the training that ran last. Resumed from a checkpoint,
            it measures angles to the factors of the checkpoint.

    Raises:
        ValueError: ``every`` is not a positive whole number.
    """

    def __init__(self, every: int = 100, plot: str | os.PathLike[str] | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: found {every!r}, wanted a whole number of steps, 1 or more.")
        self.every = every
        self.plot = plot
        self.recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the factors as they start.

        Raises:
            ValueError: the model has no trainable StelLA factors.
        """
        self.recorder = Recorder(kwargs["model"])
        self.recorder.record(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record every so many steps."""
        if self.recorder is not None and state.global_step % self.every == 0:
            self.recorder.record(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the last step, and draw where asked to, in the first process only."""
        if self.recorder is None:
            return
        if self.recorder.history[-1].step != state.global_step:
            self.recorder.record(state.global_step)
        if self.plot is not None and state.is_world_process_zero:
            self.recorder.plot(self.plot)

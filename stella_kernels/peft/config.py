"""The adapter's configuration: the fields, names and defaults of the published package's, checked on creation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from peft.config import PeftConfig

from ..checks import check_choice, check_finite_number, check_whole_number
from .registration import extend_peft_type

RETRACTIONS = ("polar", "exp_map", "qr", "cayley")
GEOMETRIES = ("stiefel", "euclidean", "quotient")
INITS = ("rando", "svd_major", "svd_minor", "zero", "pseudo_zero")
BIASES = ("none", "all", "lora_only")
_COLLECTIONS = (list, tuple, set, frozenset)  # what names may come in; JSON has lists


@dataclass
class StellaConfig(PeftConfig):
    """Configuration of a StelLA adapter, ``W x + s · U S Vᵀ x`` with orthonormal ``U`` and ``V`` (arXiv 2510.01938).

    Fields that LoRA has too mean what they mean in ``peft.LoraConfig``; some differ, and are described in full.

    Args:
        r: rank; at most the smaller dimension of every layer it is put on.
        target_modules: names (or endings of names) of the layers to adapt (linear layers, embeddings, convolutions), a
            regular expression for whole names, or ``'all-linear'``, which leaves out, with a warning, layers whose
            parent never calls them (the ``out_proj`` of ``nn.MultiheadAttention``). Default: PEFT's choice for LoRA on
            the model's type.
        exclude_modules: names (or endings of names), or a regular expression, of layers to leave out.
        lora_alpha: scale of the adapter: ``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability, below 1, of dropping an element of the adapter's input while training.
        stella_retraction: how ``U`` and ``V`` return to the manifold after a step: ``'polar'``, ``'exp_map'``, ``'qr'``
            or ``'cayley'``. Read, as the geometry is, by ``StellaTrainer`` and ``StellaCallback``.
        stella_geometry: ``'stiefel'``, or for ablation ``'euclidean'`` (no constraint) or ``'quotient'`` (U, S and V
            move together, horizontally; S full), see ``optim.attach``.
        stella_diag_s: store ``S`` as a vector of r numbers, the diagonal.
        stella_frozen_subspaces: train S alone; U and V stay where they start. With ``init_lora_weights='svd_major'``
            the method of LoRA-XS (S full) and SVFit (S diagonal). There is nothing to attach then.
        stella_grad_scaling: divide a factor's step by ``sqrt(n / d)``, n being its long side: ``True`` takes the
            model's hidden size as d, a number is d itself, ``False`` leaves steps alone.
        fan_in_fan_out: the weight of a layer that is neither ``nn.Linear`` nor ``Conv1D`` (which are recognised, and
            for which this field is not looked at) is stored (n, m).
        bias: ``'none'``, ``'all'`` or ``'lora_only'`` (biases of the adapted layers).
        use_rslora: ``s = lora_alpha / sqrt(r)``.
        modules_to_save: names of further modules to train in full and to save, such as a new classifier head.
        init_lora_weights: ``True`` or ``'rando'``: random orthonormal ``U`` and ``V``; ``'svd_major'`` or
            ``'svd_minor'``: singular vectors of ``W`` of the largest or smallest singular values; ``S`` is the
            identity in all of them. ``'zero'``: random ``U`` and ``V``, ``S`` zero. ``'pseudo_zero'``: as ``'rando'``,
            and the adapter's start is subtracted again, without touching ``W``: each layer keeps its first ``U`` and
            ``Vᵀ`` (``stella_U0``, ``stella_Vt0``), which are saved with the adapter, and adds ``−s · U0 V0ᵀ x``, so the
            published package cannot read such an adapter. ``False``: the first r columns of the identity, for factors
            that will be set. Once a checkpoint is loaded it decides, and this no longer matters.
        layers_to_transform: index, or indices, of the layers to adapt; needs ``target_modules`` as a list.
        layers_pattern: name, or names, of the module list that ``layers_to_transform`` indexes.
        rank_pattern: ranks that differ from ``r``, by layer name or regular expression.
        alpha_pattern: scales that differ from ``lora_alpha``, by layer name or regular expression.
        layer_replication: ranges [start, end) of layers to stack into a deeper model that shares base weights.
        trainable_token_indices: indices of tokens whose embeddings are trained in full and saved; or those by name of
            the embedding layer.
        ensure_weight_tying: keep tied what the model ties to its input embedding, where that embedding is in
            ``modules_to_save`` or ``trainable_token_indices``.
        stella_layer_kinds: not to be set. The model writes here, by name, which adapted layers are no linear ones:
            ``'embedding'``, the sizes (in, kh, kw) of a convolution's kernel, or in words a convolution that PEFT's
            LoRA does not compute. An export reads it from the folder.

    Raises:
        TypeError: a field of a wrong type; the message names it.
        ValueError: a field outside what it may be; the message names it.
    """

    r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or endings of names) or a regular expression of layers to adapt, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or endings of names) or a regular expression of layers to leave out."}
    )
    lora_alpha: int = field(default=8, metadata={"help": "Scale of the adapter, divided by r (or sqrt(r))."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    stella_retraction: str = field(
        default="polar", metadata={"help": "Retraction after a step: 'polar', 'exp_map', 'qr' or 'cayley'."}
    )
    stella_geometry: str = field(
        default="stiefel", metadata={"help": "Geometry of training: 'stiefel', 'euclidean' or 'quotient'."}
    )
    stella_diag_s: bool = field(default=False, metadata={"help": "Keep S diagonal, stored as a vector."})
    stella_frozen_subspaces: bool = field(default=False, metadata={"help": "Train S alone; U and V stay."})
    stella_grad_scaling: bool | float = field(
        default=True, metadata={"help": "Scale steps by sqrt(d / n): True (d = hidden size), False, or the number d."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Weights of layers of unknown type are stored (fan_in, fan_out)."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'lora_only'."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save, such as a new classifier head."}
    )
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "True or 'rando', 'svd_major', 'svd_minor', 'zero', 'pseudo_zero', or False."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; needs target_modules as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform indexes."}
    )
    rank_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "Ranks that differ from r, by layer name or regular expression."}
    )
    alpha_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "Scales that differ from lora_alpha, by name or regular expression."}
    )
    layer_replication: list[tuple[int, int]] | None = field(
        default=None,
        metadata={"help": "Ranges [start, end) of layers to stack into a deeper model that shares base weights."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings to train, or those by name of the embedding layer."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Keep tied what the model ties to its input embedding."}
    )
    stella_layer_kinds: dict | None = field(
        default_factory=dict,
        metadata={"help": "Written by the model, not read: kinds of the layers that are not linear, by name."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type()
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        self.stella_layer_kinds = {} if self.stella_layer_kinds is None else self.stella_layer_kinds
        self._check_fields()
        for name in ("target_modules", "exclude_modules"):
            if not isinstance(names := getattr(self, name), str | None):
                setattr(self, name, set(names))  # as PEFT's configs

    def _check_fields(self) -> None:
        check_whole_number("r", self.r)
        for name in ("lora_alpha", "lora_dropout"):
            check_finite_number(name, getattr(self, name))
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: found {self.lora_dropout!r}, wanted a probability, 0 <= p < 1.")
        for name in ("stella_diag_s", "stella_frozen_subspaces", "fan_in_fan_out", "use_rslora", "ensure_weight_tying"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: found {value!r}, wanted True or False.")
        for name in ("target_modules", "exclude_modules"):
            _check_names(name, names := getattr(self, name), single="a regular expression, or ")
            if isinstance(names, str) and names != "all-linear":
                _check_expression(name, names)
        _check_names("modules_to_save", self.modules_to_save)
        _check_names("layers_pattern", self.layers_pattern, single="a name, or ")
        _check_pattern("rank_pattern", self.rank_pattern, check_whole_number)
        _check_pattern("alpha_pattern", self.alpha_pattern, check_finite_number)
        if not isinstance(self.stella_layer_kinds, dict):
            raise TypeError(
                f"stella_layer_kinds: found {self.stella_layer_kinds!r}, wanted what a model writes; leave it out."
            )
        indices = self.layers_to_transform
        for index in [] if indices is None else indices if isinstance(indices, _COLLECTIONS) else [indices]:
            check_whole_number("layers_to_transform", index, smallest=0)
        _check_tokens("trainable_token_indices", self.trainable_token_indices)
        _check_ranges("layer_replication", self.layer_replication)
        check_choice("stella_retraction", self.stella_retraction, RETRACTIONS)
        check_choice("stella_geometry", self.stella_geometry, GEOMETRIES)
        if self.stella_geometry == "quotient" and self.stella_diag_s:
            raise ValueError(
                "stella_diag_s: found True with stella_geometry='quotient', wanted False: rotating U and V would not "
                "leave S diagonal, so there is no quotient to take."
            )
        if self.stella_geometry == "quotient" and self.stella_frozen_subspaces:
            raise ValueError(
                "stella_frozen_subspaces: found True with stella_geometry='quotient', wanted False: the quotient moves "
                "U, S and V together."
            )
        check_choice("bias", self.bias, BIASES)
        if not isinstance(self.init_lora_weights, bool):
            check_choice("init_lora_weights", self.init_lora_weights, INITS)
        scaling = self.stella_grad_scaling
        if not isinstance(scaling, int | float):
            raise TypeError(f"stella_grad_scaling: found {scaling!r}, wanted True, False or a positive number.")
        if not isinstance(scaling, bool) and not 0 < scaling < math.inf:
            raise ValueError(f"stella_grad_scaling: found {scaling!r}, wanted True, False or a positive number.")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: found {getattr(self, name)!r} beside target_modules={self.target_modules!r}; it "
                        "selects among names: give target_modules as a list, or select layers in the expression."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: found {self.layers_pattern!r} without layers_to_transform, which says which layers "
                "of that module list to adapt; give both."
            )


def _check_names(field_name: str, value: object, single: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is None, a collection of strings, or where ``single`` says so a string."""
    if value is None or (single and isinstance(value, str)):
        return
    if not isinstance(value, _COLLECTIONS) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{field_name}: found {value!r}, wanted {single}a list of names.")


def _check_expression(field_name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{field_name}: found {expression!r}, which is no regular expression ({error}); give names in a list."
        ) from error


def _check_pattern(field_name: str, value: object, check: Callable[[str, object], None]) -> None:
    """Raise unless ``value`` is a dictionary of numbers that ``check`` accepts, by regular expression."""
    if not isinstance(value, dict):
        raise TypeError(f"{field_name}: found {value!r}, wanted a dictionary of numbers by layer name.")
    for key, number in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{field_name}: found the key {key!r}, wanted a layer name or a regular expression.")
        _check_expression(field_name, key)
        check(f"{field_name}[{key!r}]", number)


def _check_tokens(field_name: str, value: object) -> None:
    """Raise unless ``value`` is None, a list of indices, or a dictionary of such lists by name."""
    if value is None:
        return
    for indices in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(indices, _COLLECTIONS):
            raise TypeError(
                f"{field_name}: found {value!r}, wanted a list of indices, or a dictionary of them by name."
            )
        for index in indices:
            check_whole_number(field_name, index, smallest=0)


def _check_ranges(field_name: str, value: object) -> None:
    """Raise unless ``value`` is None or a list of pairs [start, end) of whole numbers."""
    if value is None:
        return
    ranges = list(value) if isinstance(value, list | tuple) else [None]
    for pair in ranges:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"{field_name}: found {value!r}, wanted a list of pairs (start, end).")
        for bound in pair:
            check_whole_number(field_name, bound, smallest=0)
        if pair[0] >= pair[1]:
            raise ValueError(f"{field_name}: found the range {tuple(pair)}, wanted start < end.")

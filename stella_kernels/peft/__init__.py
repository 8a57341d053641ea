"""StelLA for Hugging Face PEFT: ``from stella_kernels.peft import StellaConfig``, then PEFT's own ``get_peft_model``.

Importing this package teaches PEFT the adapter type ``STELLA`` (``registration.py``), so it must be imported before a
StelLA adapter is created or loaded. ``StellaTrainer`` and its kin are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registration import OLDEST_PEFT, register, require_peft

require_peft()

from .config import StellaConfig  # noqa: E402  (needs PEFT, which was just checked for)
from .layer import StellaLayer  # noqa: E402
from .layers import Conv, Embedding, Linear  # noqa: E402
from .lora_export import convert_to_lora, save_as_lora, teach_conversion  # noqa: E402
from .model import StellaModel  # noqa: E402
from .ranks.reduction import reduce_rank  # noqa: E402

register(StellaConfig, StellaModel)
teach_conversion()

if TYPE_CHECKING:
    from .ranks.schedule import RankSchedule
    from .trainer import (
        DiagnosticsCallback,
        StellaCallback,
        StellaTrainer,
        StellaTrainerMixin,
        attach_adapter,
        parameter_groups,
    )

_FROM_TRAINER = (
    "DiagnosticsCallback",
    "StellaCallback",
    "StellaTrainer",
    "StellaTrainerMixin",
    "attach_adapter",
    "parameter_groups",
)

__all__ = [
    "OLDEST_PEFT",
    "Conv",
    "DiagnosticsCallback",
    "Embedding",
    "Linear",
    "RankSchedule",
    "StellaCallback",
    "StellaConfig",
    "StellaLayer",
    "StellaModel",
    "StellaTrainer",
    "StellaTrainerMixin",
    "attach_adapter",
    "convert_to_lora",
    "parameter_groups",
    "reduce_rank",
    "save_as_lora",
]


def __getattr__(name: str) -> Any:
    # transformers.Trainer is slow to import and not needed to build or to load an adapter
    if name in _FROM_TRAINER:
        from . import trainer

        return getattr(trainer, name)
    if name == "RankSchedule":
        from .ranks.schedule import RankSchedule

        return RankSchedule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

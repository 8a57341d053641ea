"""LoRA to compare with: PEFT's where it can be imported, else the same in three lines of torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def peft_why_not() -> str:
    """Why PEFT cannot be used, or nothing where it can."""
    try:
        import peft  # noqa: F401
    except Exception as error:  # absent, or unfit for what else is installed
        return f"{type(error).__name__}: {error}"
    return ""


def lora_is() -> str:
    """What a table says its LoRA is."""
    why_not = peft_why_not()
    if why_not:
        return f"three lines of torch, since PEFT cannot be imported ({why_not})"
    import peft

    return f"PEFT {peft.__version__}'s"


class PlainLora(nn.Module):
    """``base(x) + s B A dropout(x)``, with float32 factors as PEFT keeps them, or factors of the base's dtype."""

    def __init__(self, base: nn.Linear, r: int, dropout: float, masters: bool = True) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        dtype = torch.float32 if masters else base.weight.dtype
        self.A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(r, base.out_features, bias=False, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        result = result + self.B(self.A(self.dropout(x.to(self.A.weight.dtype))))
        return result.to(x.dtype)


def lora(base: nn.Linear, r: int, dropout: float, masters: bool = True) -> nn.Module:
    """The layer with LoRA around its frozen ``base``, at scale 1; without ``masters`` nothing of it is cast."""
    if peft_why_not():
        return PlainLora(base, r, dropout, masters)
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, target_modules=["0"])
    return get_peft_model(nn.Sequential(base), settings, autocast_adapter_dtype=masters).base_model.model[0]

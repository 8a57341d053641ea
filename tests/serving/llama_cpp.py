"""GGUF files for llama.cpp, as its own converters write them: a float32 model, and a LoRA adapter of a Llama.

Users are pointed to llama.cpp's ``convert_lora_to_gguf.py``; this is its part for a Llama.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_float32_model(source: Path, target: Path) -> None:
    """The model of a GGUF file, dequantized: in a quantized one llama.cpp rounds activations too."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    _write(writer)


def write_lora(adapter: Path, target: Path, config: Any) -> None:
    """The LoRA adapter of a folder; ``config`` is the Llama's, whose q and k rows llama.cpp wants in another order."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for key, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        found = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight", key)
        assert found, key
        layer, module, kind = found.groups()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        if kind == "B" and heads:
            m, r = tensor.shape
            tensor = tensor.reshape(heads, 2, m // heads // 2, r).swapaxes(1, 2).reshape(m, r)
        writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight.lora_{kind.lower()}", np.ascontiguousarray(tensor))
    _write(writer)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

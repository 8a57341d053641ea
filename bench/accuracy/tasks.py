"""The tasks of PROTOCOL.md: examples as the last block reads them, and what a seed draws of them."""

from __future__ import annotations

import copy
import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.accuracy.encoder import Blocks, DinoV2, MiniLM
from examples.movie_reviews import rated_snippets

VALIDATION, TEST, POOL = 300, 600, 3000
LONGEST = 20
PIXELS = 56
NAMES = ("sentiment", "rating", "fashion")


@dataclass(frozen=True)
class Task:
    """Examples (N, L, width) that the last block reads, in the order validation, test, pool for training."""

    name: str
    x: Tensor
    mask: Tensor | None
    y: Tensor
    classes: int  # 1 for a regression
    training: int
    held_out: tuple[int, int]
    tail: Callable[[], Blocks]

    def validation(self) -> Tensor:
        return torch.arange(self.held_out[0])

    def test(self) -> Tensor:
        return torch.arange(self.held_out[0], sum(self.held_out))

    def drawn(self, seed: int) -> Tensor:
        """The training examples of a seed."""
        first = sum(self.held_out)
        chosen = random.Random(seed).sample(range(first, len(self.y)), self.training)
        return torch.tensor(chosen)


def _below(model: Blocks, x: Tensor, mask: Tensor | None) -> Tensor:
    """What the last block reads."""
    for block in list(model.blocks)[:-1]:
        x = block(x, mask)
    return x


def _tail(model: Blocks) -> Callable[[], Blocks]:
    def fresh() -> Blocks:
        return Blocks([copy.deepcopy(list(model.blocks)[-1])], copy.deepcopy(model.last_norm))

    return fresh


@torch.no_grad()
def _reviews(name: str, data: Path) -> Task:
    snippets = rated_snippets(data / "vaderSentiment-3.3.2.tar.gz")
    if name == "sentiment":
        snippets = [pair for pair in snippets if abs(pair[0]) >= 0.5]
    random.Random(17).shuffle(snippets)
    snippets = snippets[: VALIDATION + TEST + POOL]
    model, parts, masks = MiniLM(), [], []
    for start in range(0, len(snippets), 64):
        x, mask = model.embed([text for _, text in snippets[start : start + 64]], LONGEST)
        parts.append(_below(model.model, x, mask))
        masks.append(mask)
    ratings = torch.tensor([rating for rating, _ in snippets])
    few = name == "sentiment"
    y = (ratings > 0).long() if few else ratings
    sizes = (2, 128) if few else (1, 1500)
    return Task(name, torch.cat(parts), torch.cat(masks), y, *sizes, (VALIDATION, TEST), _tail(model.model))


def _images(data: Path, which: str) -> tuple[Tensor, Tensor]:
    def numbers(name: str, header: int) -> Tensor:
        packed = (data / f"{which}-{name}.gz").read_bytes()
        return torch.frombuffer(bytearray(gzip.decompress(packed)[header:]), dtype=torch.uint8)

    return numbers("images-idx3-ubyte", 16).view(-1, 28, 28), numbers("labels-idx1-ubyte", 8).long()


@torch.no_grad()
def _fashion(data: Path) -> Task:
    folder = data / "fashion-mnist"
    trained, tested = _images(folder, "train"), _images(folder, "t10k")
    order = torch.randperm(len(trained[1]), generator=torch.Generator().manual_seed(17))[: VALIDATION + POOL]
    own = torch.randperm(len(tested[1]), generator=torch.Generator().manual_seed(17))[:TEST]
    held, pool = order[:VALIDATION], order[VALIDATION:]
    images = torch.cat([trained[0][held], tested[0][own], trained[0][pool]]).float() / 255
    y = torch.cat([trained[1][held], tested[1][own], trained[1][pool]])
    model, parts = DinoV2(), []
    for part in images.split(64):
        large = torch.nn.functional.interpolate(part[:, None], (PIXELS, PIXELS), mode="bicubic", align_corners=False)
        parts.append(_below(model.model, model.embed(large[:, 0].clamp(0, 1)), None))
    return Task("fashion", torch.cat(parts), None, y, 10, 1500, (VALIDATION, TEST), _tail(model.model))


def load(name: str, data: Path) -> Task:
    """The task, its frozen part out of ``data/accuracy`` where it was computed before."""
    make = (lambda: _fashion(data)) if name == "fashion" else (lambda: _reviews(name, data))
    sizes = f"{VALIDATION}-{TEST}-{POOL}-{PIXELS if name == 'fashion' else LONGEST}"
    file = data / "accuracy" / f"{name}-{sizes}.pt"
    if file.exists():
        stored = torch.load(file, weights_only=True)
        model = DinoV2().model if name == "fashion" else MiniLM().model
        kept = (stored["x"], stored["mask"], stored["y"], stored["classes"], stored["training"])
        return Task(name, *kept, (VALIDATION, TEST), _tail(model))
    task = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {"x": task.x, "mask": task.mask, "y": task.y, "classes": task.classes, "training": task.training}
    torch.save(stored, file)
    return task

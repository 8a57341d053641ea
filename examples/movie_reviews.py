"""Movie-review snippets with human ratings, as prompts whose next token is the sentiment.

The snippets and the mean ratings of some twenty readers each come with the source package of vaderSentiment 3.3.2
(MIT; Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014): tab-separated identifier, mean rating from -4 to 4, text.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_FILE = "movieReviewSnippets_GroundTruth.txt"
ANSWERS = (" negative", " positive")  # indexed by label: 0, 1


@dataclass(frozen=True)
class Review:
    """One snippet and its label: 1 for a positive mean rating, 0 for a negative one."""

    text: str
    label: int


def load_reviews(source_package: Path, neutral_band: float = 0.5) -> list[Review]:
    """Read the rated snippets out of the source package, leaving out those rated within ``neutral_band`` of 0.

    Raises ``FileNotFoundError`` that says how to fetch the package where it is not there.
    """
    rated = rated_snippets(source_package)
    return [Review(text, int(rating > 0)) for rating, text in rated if abs(rating) >= neutral_band]


def rated_snippets(source_package: Path) -> list[tuple[float, str]]:
    """Mean rating and text of every snippet; raises as ``load_reviews`` does."""
    if not source_package.is_file():
        raise FileNotFoundError(
            f"{source_package}: not found, wanted the source package of vaderSentiment 3.3.2; `make demo` "
            "fetches it, or: pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==3.3.2"
        )
    inner = _member(source_package.read_bytes(), INNER_ARCHIVE)
    text = _member(inner, RATINGS_FILE).decode("latin-1")
    lines = (line.split("\t", 2) for line in text.splitlines())
    return [(float(rating), snippet.strip()) for _, rating, snippet in lines]


def _member(packed: bytes, ending: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for entry in archive:
            if entry.name.endswith(ending) and (file := archive.extractfile(entry)) is not None:
                return file.read()
    raise FileNotFoundError(f"no member ending in {ending!r} in the archive; is it another release?")


def split(reviews: Sequence[Review], held_out: int, seed: int) -> tuple[list[Review], list[Review]]:
    """Shuffle by ``seed`` and divide into (training, held out), the latter of ``held_out`` snippets."""
    shuffled = list(reviews)
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


class Prompts:
    """Turns reviews into left-padded batches, so that the answer is what the last position predicts."""

    def __init__(self, tokenizer: Any, max_review_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_review_tokens = max_review_tokens
        self.answer_tokens = torch.tensor([self._single_token(answer) for answer in ANSWERS])
        self._head = tokenizer("Review:").input_ids
        self._tail = tokenizer("\nSentiment:").input_ids

    def _single_token(self, text: str) -> int:
        tokens = self.tokenizer(text).input_ids
        if len(tokens) != 1:
            raise ValueError(f"answer {text!r}: found {len(tokens)} tokens, wanted 1; choose an answer of one token.")
        return int(tokens[0])

    def batch(self, reviews: Sequence[Review]) -> tuple[dict[str, Tensor], Tensor]:
        """Return (model inputs of shape (B, L), labels (B,) of 0 and 1); long reviews are cut."""
        rows = []
        for review in reviews:
            body = self.tokenizer(" " + review.text).input_ids[: self.max_review_tokens]
            rows.append(self._head + body + self._tail)
        length = max(map(len, rows))
        tokens = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        labels = torch.tensor([review.label for review in reviews])
        return {"input_ids": tokens, "attention_mask": mask}, labels


def random_batches(reviews: Sequence[Review], size: int, seed: int) -> Iterator[list[Review]]:
    """Endless batches of ``size``, in a fresh order every epoch and of similar length, so that little is padding."""
    rng = random.Random(seed)
    pool = 8 * size  # lengths are sorted only within a pool, which keeps batches random
    while True:
        order = list(reviews)
        rng.shuffle(order)
        for start in range(0, len(order) - pool + 1, pool):
            window = sorted(order[start : start + pool], key=lambda review: len(review.text))
            batches = [window[i : i + size] for i in range(0, pool, size)]
            rng.shuffle(batches)
            yield from batches

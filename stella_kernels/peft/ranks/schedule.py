"""Training at a high rank and cutting to a budget on the way, by the singular values of all layers together."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback

from ...checks import check_finite_number, check_whole_number
from ..layer import adapter_layers
from .reduction import reduce_rank


class RankSchedule(TrainerCallback):
    """Cuts an adapter's ranks to a budget while it trains: ``callbacks=[RankSchedule(budget=...)]``.

    Between the shares ``begin`` and ``end`` of all steps the sum of the layers' ranks falls from what it is to
    ``budget``, in ``cuts`` cuts, fast at first (AdaLoRA's cubic schedule); the rest of training is at the final ranks.
    Each cut keeps the largest singular values of all layers together (``reduce_rank``), and the optimizer's moments
    follow. With ``StellaTrainer``, ``StellaCallback`` or ``StellaAdamW``; S full or diagonal.

    To resume from a checkpoint written after a cut, load the adapter from the checkpoint first
    (``PeftModel.from_pretrained(base, checkpoint, is_trainable=True)``), so that the model has its ranks.

    Args:
        budget: the sum of the ranks of all layers when it is over; at least one a layer.
        begin: the share of the steps, at least 0, after which the first cut is made.
        end: the share, above ``begin`` and below 1, by which the last one is.
        cuts: how many; each costs a small SVD a layer, and what compiled for the old shapes.
        adapter_name: the adapter.

    Attributes:
        history: (step, sum of the ranks) after each cut.

    Raises:
        TypeError, ValueError: a wrong argument; the message names it.
    """

    def __init__(
        self, budget: int, begin: float = 0.2, end: float = 0.6, cuts: int = 8, adapter_name: str = "default"
    ) -> None:
        check_whole_number("budget", budget)
        check_whole_number("cuts", cuts)
        for name, value in (("begin", begin), ("end", end)):
            check_finite_number(name, value)
        if not 0 <= begin < end < 1:
            raise ValueError(f"begin, end: found {begin} and {end}, wanted 0 <= begin < end < 1.")
        self.budget, self.begin, self.end, self.cuts, self.adapter_name = budget, begin, end, cuts, adapter_name
        self.history: list[tuple[int, int]] = []
        self._planned: dict[int, int] = {}  # budgets by step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan the cuts.

        Raises:
            ValueError: the budget is less than one a layer or more than the sum of the ranks, training is too short, or
                the adapter subtracts a start ('pseudo_zero').
            NotImplementedError: several processes train, each of which would cut by itself.
        """
        processes = torch.distributed if torch.distributed.is_available() else None
        if processes is not None and processes.is_initialized() and processes.get_world_size() > 1:
            raise NotImplementedError(
                "RankSchedule: found several processes, which hold gradients in buckets of fixed shapes, wanted one; "
                "train at the high rank and call stella_kernels.peft.reduce_rank afterwards."
            )
        layers = adapter_layers(kwargs["model"], self.adapter_name)
        total = sum(layer.r[self.adapter_name] for layer in layers.values())
        if not len(layers) <= self.budget <= total:
            raise ValueError(
                f"budget: found {self.budget}, wanted {len(layers)} (one for each layer) to {total} (the sum of the "
                "ranks now)."
            )
        if started := [name for name, layer in layers.items() if layer.start(self.adapter_name) is not None]:
            raise ValueError(
                f"init_lora_weights: found 'pseudo_zero', whose start {started[0]} subtracts, so that its rank is not "
                "its factors' alone, wanted another start; 'zero' begins at the base model too."
            )
        first, last = math.ceil(self.begin * state.max_steps), math.floor(self.end * state.max_steps)
        if last < max(first, 1):
            raise ValueError(
                f"begin, end: found no step between {self.begin} and {self.end} of {state.max_steps} steps, wanted at "
                "least one; train longer, or move them apart."
            )
        self.history = []
        self._planned = {}
        for cut in range(1, self.cuts + 1):
            share = cut / self.cuts
            step = max(round(first + share * (last - first)), 1)
            left = self.budget + round((total - self.budget) * (1 - share) ** 3)
            self._planned[step] = left  # of several at one step the last, which is the smallest

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut where it is time. A model resumed at a later step than a cut's has it already."""
        budget = self._planned.get(state.global_step)
        if budget is None:
            return
        ranks = reduce_rank(
            kwargs["model"], budget=budget, adapter_name=self.adapter_name, optimizer=kwargs["optimizer"]
        )
        self.history.append((state.global_step, sum(ranks.values())))

"""Learning-rate schedulers that torch does not have, for ``model.scheduler``; stepped once per optimiser update."""

import math
from functools import partial
from typing import get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from modules.functional.schedules import Decay, wsd

__all__ = ["WSD"]


class WSD(LambdaLR):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395 section 4): runs branch off the stable part, whose length need
    not be known before.

    A run resumed from a checkpoint of the stable part with another decay, or another ``decay_start`` that is not before
    the checkpoint, goes on from there.

    Args:
        optimizer: whose learning rates are the peak.
        warmup_steps: updates of linear warm-up from 0.
        decay_start: the update at which the decay begins; about 10 % of the tokens behind it are enough.
        total_steps: updates in all, where a linear or cosine decay ends.
        decay: ``exponential``, ``linear`` or ``cosine``.
        half_life: updates in which an exponential decay halves the learning rate; None = a tenth of the peak at
            ``total_steps``.
        final: where a linear or cosine decay ends, as a share of the peak.

    Raises:
        ValueError: steps out of order, or a value out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        decay_start: int,
        total_steps: int,
        decay: Decay = "exponential",
        half_life: float | None = None,
        final: float = 0.1,
    ) -> None:
        if not 0 <= warmup_steps <= decay_start < total_steps:
            raise ValueError(
                f"WSD needs 0 <= warmup_steps <= decay_start < total_steps, got {warmup_steps}, {decay_start}, "
                f"{total_steps}"
            )
        if decay not in get_args(Decay) or not 0 <= final <= 1 or (half_life is not None and half_life <= 0):
            raise ValueError(
                f"WSD needs decay of {', '.join(get_args(Decay))}, final in [0, 1], half_life > 0, got {decay}, "
                f"{final}, {half_life}"
            )
        half_life = half_life or (total_steps - decay_start) * math.log10(2)
        factor = partial(
            wsd,
            warmup_steps=warmup_steps,
            decay_start=decay_start,
            total_steps=total_steps,
            decay=decay,
            half_life=half_life,
            final=final,
        )
        super().__init__(optimizer, factor)

"""Learning-rate schedulers that torch does not have, for ``model.scheduler``. They step once per optimiser update."""

import math
from functools import partial
from typing import get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from modules.functional.schedules import Decay, warmup_decay, wsd

__all__ = ["WSD", "ConstantWithWarmup", "CosineDecay", "LinearDecay"]


class RunSchedule(LambdaLR):
    """A schedule over the whole run. Before the first update the module calls ``plan`` with the length of the run.

    Args:
        optimizer: its learning rates are the peak.
        warmup: length of the linear warm-up, as a share of the run in [0, 1) or as a whole number of updates >= 1.
        final: learning rate at the end of the decay, as a share of the peak, in [0, 1].

    Raises:
        ValueError: a value is out of range.
    """

    decay: Decay | None = None

    def __init__(self, optimizer: Optimizer, warmup: float = 0.03, final: float = 0.0) -> None:
        if not (0 <= warmup < 1 or (1 <= warmup < math.inf and warmup == int(warmup))):
            raise ValueError(
                f"{type(self).__name__}: warmup is {warmup}; set a share of the run in [0, 1) or a whole number of "
                "updates"
            )
        if not 0 <= final <= 1:
            raise ValueError(f"{type(self).__name__}: final is {final}; set a share of the peak in [0, 1]")
        self.warmup, self.final, self.total_steps = warmup, final, math.inf
        super().__init__(optimizer, lambda step: self.factor(step))

    @property
    def warmup_steps(self) -> int:
        """Updates of the warm-up. A share is rounded up; it gives 0 while the length of the run is not known."""
        if self.warmup >= 1:
            return int(self.warmup)
        return 0 if math.isinf(self.total_steps) else math.ceil(self.warmup * self.total_steps)

    def factor(self, step: int) -> float:
        """Return the factor of the peak learning rate at an update, counted from 0."""
        return warmup_decay(step, self.warmup_steps, self.total_steps, self.decay, self.final)

    def plan(self, total_steps: float) -> None:
        """Spread the schedule over ``total_steps`` updates, and set the current learning rate by it."""
        self.total_steps = total_steps
        self._last_lr = [rate * self.factor(self.last_epoch) for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class LinearDecay(RunSchedule):
    """Warms up, then falls linearly to ``final`` at the end of the run, as the Hugging Face Trainer does by default."""

    decay = "linear"


class CosineDecay(RunSchedule):
    """Warms up, then falls along half a cosine to ``final`` at the end of the run.

    Source: arXiv 1608.03983, without restarts.
    """

    decay = "cosine"


class ConstantWithWarmup(RunSchedule):
    """Warms up, then stays at the peak."""

    def __init__(self, optimizer: Optimizer, warmup: float = 0.03) -> None:
        super().__init__(optimizer, warmup)


class WSD(LambdaLR):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395, section 4).

    Runs branch off the stable part, whose length need not be known in advance. A checkpoint of the stable part may be
    resumed with another ``decay``, or with another ``decay_start`` that is not before the checkpoint.

    Args:
        optimizer: its learning rates are the peak.
        warmup_steps: >= 0, updates of linear warm-up from 0.
        decay_start: the update at which the decay begins. A decay over about 10 % of the tokens is enough.
        total_steps: updates in all, where a linear or cosine decay ends.
        decay: ``exponential``, ``linear`` or ``cosine``.
        half_life: > 0, updates in which an exponential decay halves the learning rate. None = it reaches a tenth of the
            peak at ``total_steps``.
        final: learning rate at the end of a linear or cosine decay, as a share of the peak, in [0, 1].

    Raises:
        ValueError: the steps are out of order, or a value is out of range.
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

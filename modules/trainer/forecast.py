"""Tells at the start of a fit how much memory and time it takes."""

import math
import time
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from modules.trainer.steps import count_updates

ENOUGH_SECONDS = 2.0  # seconds of training to measure before the line is printed
ENOUGH_STEPS = 20


class HasForecast(Protocol):
    """The part of a LightningModule that ``Forecast`` reads."""

    peak: float | None  # MB
    num_tokens: int  # tokens trained on so far
    torch_compile: bool  # whether the first step compiles layers
    record: Any  # its ``metrics`` hold the seconds of sampling and scoring of the phase


@runtime_checkable
class HasLengths(Protocol):
    """A sampler of micro-batches that knows how many tokens each row of an epoch has."""

    lengths: Sequence[int]

    def __len__(self) -> int:
        """Return the micro-batches of an epoch."""


class Forecast(Callback):
    """Prints "estimate: about 3.1 GB, 41 s a phase, 2 h 10 min in all" behind the first step of a fit.

    Times are measured, not computed: a step by the first one, as soon as it is over, a phase by its sampling and scoring
    and the steps that it has. A first step of less than two seconds is mostly start-up work. The line then waits until
    two seconds of later steps are measured, and leaves out the first step. It leaves it out too if layers are compiled.
    Where the rows' lengths are known, a step counts by its tokens. Validations count if Lightning's check before the
    training measured one.
    """

    def __init__(self) -> None:
        self.said = False
        self._begun = 0.0
        self._tokens = 0  # tokens trained on before the step
        self._steps: list[tuple[float, float, int]] = []  # by step: seconds, those of its phase before it, tokens
        self._validation: float | None = None  # seconds of a whole validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a validation."""
        self._begun = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the time of the validation before the training, which may be a part of one."""
        if trainer.sanity_checking:
            done, whole = sum(trainer.num_sanity_val_batches), sum(trainer.num_val_batches)
            self._validation = (time.perf_counter() - self._begun) * whole / max(1, done)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a step at its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._begun, self._tokens = time.perf_counter(), cast(HasForecast, pl_module).num_tokens

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the line behind a step, as soon as enough is measured."""
        if self.said or ((batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch):
            return
        module = cast(HasForecast, pl_module)
        found = [module.record.metrics.get(f"time/{name}", 0.0) for name in ("sampling", "scoring")]
        self._steps.append((time.perf_counter() - self._begun, sum(found), module.num_tokens - self._tokens))
        first = sum(self._steps[0][:2]) >= ENOUGH_SECONDS and not module.torch_compile
        enough = sum(seconds for seconds, _, _ in self._steps[1:]) >= ENOUGH_SECONDS
        if first or enough or len(self._steps) > ENOUGH_STEPS:
            self.said = True
            resumed = trainer.global_step > len(self._steps)
            foreseen = self.foresee(trainer, self._steps[0 if first else 1 :])
            rank_zero_info(write_estimate(module.peak, *foreseen, "to go" if resumed else "in all"))

    def foresee(self, trainer: Trainer, steps: list[tuple[float, float, int]]) -> tuple[float, str, float, bool]:
        """Return the seconds of a step or phase, which of the two, the seconds of the fit, and whether these leave out
        validations.
        """
        seconds, before, tokens = (sum(column) for column in zip(*steps, strict=True))
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        per_epoch = math.ceil(batches / accumulate) if math.isfinite(batches) else math.inf
        sampler, step = getattr(trainer.train_dataloader, "batch_sampler", None), seconds / len(steps)
        if isinstance(sampler, HasLengths) and tokens:
            step = seconds / tokens * sum(sampler.lengths) / math.ceil(len(sampler) / accumulate)
        updates = count_updates(trainer) - trainer.global_step + len(self._steps)
        phase = before / len(steps) + step * per_epoch if before else step
        validations = count_validations(trainer, updates / per_epoch)
        whole = (updates / per_epoch if before else updates) * phase + validations * (self._validation or 0.0)
        return phase, "phase" if before else "step", whole, validations > 0 and self._validation is None


def count_validations(trainer: Trainer, epochs: float) -> float:
    """Count the validations of so many epochs."""
    if not trainer.enable_validation or not sum(trainer.num_val_batches) or not math.isfinite(epochs):
        return 0.0
    every, batches, between = trainer.check_val_every_n_epoch, trainer.num_training_batches, trainer.val_check_batch
    assert between is not None  # since there are validations
    if every is None:
        return epochs * batches // between
    return epochs // every * max(1, batches // min(between, batches))


def write_estimate(
    peak: float | None, seconds: float, unit: str, whole: float, unvalidated: bool, end: str = "in all"
) -> str:
    """Write the line.

    >>> write_estimate(3100.0, 41.2, "phase", 7830.0, False)
    'estimate: about 3.1 GB, 41 s a phase, 2 h 10 min in all'
    """
    memory = "" if peak is None else f"about {peak / 1000:.1f} GB, "
    total = ""
    if math.isfinite(whole):
        total = f", {write_duration(whole)} {end}{' without validations' if unvalidated else ''}"
    return f"estimate: {memory}{write_duration(seconds)} a {unit}{total}"


def write_duration(seconds: float) -> str:
    """Write a duration in its two largest units.

    >>> [write_duration(seconds) for seconds in (0.0123, 9.54, 119, 7199, 7830, 100_000)]
    ['0.012 s', '9.5 s', '119 s', '120 min', '2 h 10 min', '27 h 47 min']
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if seconds < 7200 else f"{minutes // 60} h {minutes % 60} min"

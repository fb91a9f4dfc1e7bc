"""Shows progress without a terminal: a line now and then, instead of a bar that redraws itself."""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from modules.trainer.steps import count_updates

SHOWN = 6  # numbers of a validation on one line, in this order
HEADLINES = (
    *("pass@1", "greedy_accuracy", "reward", "rewards/accuracies", "accuracy", "mean_token_accuracy", "loss"),
    *("objective/kl", "kl", "entropy"),
)


class StepLines(ProgressBar):
    """Prints a line with the step's numbers and the time left, and one with the numbers of each validation.

    The first and the last step have a line, and those between every ``seconds``.

    Args:
        seconds: between two lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._start = self._said = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Print nothing, as on ranks other than zero."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line that other code writes."""
        if self._enabled:
            print(*args, **kwargs, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start, self._first_step, self._said = time.monotonic(), trainer.global_step, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line, if it is time."""
        now, step, total = time.monotonic(), trainer.global_step, count_updates(trainer)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        if self._enabled and (now - self._said >= self.seconds or step == total):
            self._said = now
            left = ""
            if math.isfinite(total) and step > self._first_step:
                left = f", {show_duration((now - self._start) / (step - self._first_step) * (total - step))} left"
            of = f" of {total:.0f}" if math.isfinite(total) else ""
            numbers = show_numbers(self.get_metrics(trainer, pl_module))  # none before the end of a first phase
            self.print(f"step {step}{of}" + (f": {numbers}" if numbers else "") + left)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the numbers of a validation within a fit; Lightning prints those of ``validate``."""
        values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking and values:
            self.print(f"validation at step {trainer.global_step}: {show_numbers(pick_headlines(values))}")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line, if it is time."""
        self._batches("predict", batch_idx, trainer.num_predict_batches[dataloader_idx])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line, if it is time."""
        if not trainer.sanity_checking:
            self._batches("validation", batch_idx, trainer.num_val_batches[dataloader_idx])

    def _batches(self, what: str, batch_idx: int, total: float) -> None:
        now = time.monotonic()
        if self._enabled and now - self._said >= self.seconds:
            self._said = now
            self.print(f"{what}: batch {batch_idx + 1}" + (f" of {total:.0f}" if math.isfinite(total) else ""))


def pick_headlines(metrics: dict[str, Any]) -> dict[str, Any]:
    """Pick the few numbers that say most about a run, in the order of ``HEADLINES``; any numbers if none of these is
    there.
    """
    places = {name: HEADLINES.index(name.partition("/")[2]) for name in metrics if name.partition("/")[2] in HEADLINES}
    return {name: metrics[name] for name in (sorted(places, key=lambda name: places[name]) or sorted(metrics))[:SHOWN]}


def show_numbers(metrics: dict[str, Any]) -> str:
    """Write numbers on one line, such as ``loss 0.512, reward 0.25``."""
    return ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items() if name != "v_num")


def show_duration(seconds: float) -> str:
    """Write a duration, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

"""How a run ends that is told to: all ranks together, behind a whole step, with a checkpoint to go on from."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from modules.trainer.ranks import from_all_ranks


class StopTogether(Callback):
    """On SIGTERM or Ctrl-C, ends the run on all ranks together, with exit status 143 or 130: a fit behind the optimiser
    step at hand, with ``last.ckpt`` beside its other checkpoints, everything else behind the batch at hand.

    A signal to one rank is enough; a second one ends the run at once. Lightning's own handler communicates at once, in
    the midst of whatever the rank is doing, so that ranks wait for each other for ever; this one, which replaces it,
    only takes a note.

    Attributes:
        saved: the checkpoint that was written at the stop; None without one.

    Raises:
        SIGTERMException: on all ranks, after a signal to any of them.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal that this rank got
        self.saved: Path | None = None
        self.shared = 0.0  # batches of the evaluation or prediction that all ranks still have before them
        self._together = False  # all ranks have agreed to stop

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal; at the second one, stop."""
        if self.asked:
            raise SIGTERMException(128 + signum)
        self.asked = signum
        sys.stderr.write(f"\n{signal.Signals(signum).name}: the run stops behind this step; a second one: at once\n")

    def listen(self) -> None:
        """Put ``note`` in place of the handlers that Lightning has registered by now."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self.note)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop behind a whole step."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.stop(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, and count the batches that all ranks have (collective): some may have more."""
        self.listen()
        if trainer.predicting:
            batches = trainer.num_predict_batches
        elif trainer.testing:
            batches = trainer.num_test_batches
        else:
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self.shared = min(from_all_ranks([sum(batches)]))
        if self.shared == float("inf"):  # streams, of which nobody knows
            self.shared = 0

    on_validation_start = on_test_start = on_predict_start = begin

    def behind(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **which: Any) -> None:
        """Stop behind a batch where any rank is asked to; alone where other ranks may have no batch any more."""
        self.shared -= 1
        self.stop(trainer, together=self.shared >= 0)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = behind

    def stop(self, trainer: Trainer, together: bool = True) -> None:
        """Stop where any rank is asked to (collective if ``together``)."""
        asked = max(from_all_ranks([self.asked])) if together else self.asked
        if not asked:
            return
        self._together = together
        if trainer.training:
            self.save(trainer)
        # the process that launched the others tells how the run ended; they end quietly, or it would be killed for them
        raise SIGTERMException(128 + asked if trainer.local_rank == 0 else 0)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint, where the run keeps any."""
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        folder = next((callback.dirpath for callback in savers if callback.dirpath), None)
        if folder is not None:
            self.saved = Path(folder) / "last.ckpt"
            trainer.save_checkpoint(self.saved, weights_only=False)
        rank_zero_info(
            f"stopped behind step {trainer.global_step}, "
            + (f"from which {self.saved} goes on" if self.saved else "without a checkpoint, as the run keeps none")
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The processes that a rank started which stops alone would wait for it for ever."""
        launcher = trainer.strategy.launcher
        if isinstance(exception, SIGTERMException) and launcher is not None and not self._together:
            launcher.kill(signal.SIGKILL)

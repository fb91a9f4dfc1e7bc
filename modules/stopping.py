"""How a run ends that is told to: all ranks together, between two batches."""

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from modules.distributed import from_all_ranks


class StopTogether(Callback):
    """On SIGTERM, ends the run behind the batch at hand, on all ranks together, with exit status 143.

    A signal to one rank is enough. Lightning's own handler communicates at once, in the midst of whatever the rank is
    doing, so that ranks wait for each other for ever; this one, which replaces it, only takes a note.

    Raises:
        SIGTERMException: behind a batch, on all ranks, after a signal to any of them.
    """

    def __init__(self) -> None:
        self.asked = False  # this rank, to stop
        self.shared = 0.0  # batches of the evaluation or prediction that all ranks still have before them

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal."""
        self.asked = True

    def listen(self) -> None:
        """Put ``note`` in place of the handler that Lightning has registered by now."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.note)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self.listen()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Stop where any rank is asked to (collective): all have as many batches."""
        stop_if(any(from_all_ranks([self.asked])), trainer)

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
        """Stop where any rank is asked to (collective); alone where other ranks may have no batch any more."""
        self.shared -= 1
        stop_if(self.asked if self.shared < 0 else any(from_all_ranks([self.asked])), trainer)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = behind


def stop_if(asked: bool, trainer: Trainer) -> None:
    """SIGTERMException if ``asked``. The process that launched the others tells how it ended."""
    if asked:
        # an exit status other than 0 of a launched process would make Lightning kill the first, whatever it is at
        raise SIGTERMException(128 + signal.SIGTERM if trainer.local_rank == 0 else 0)

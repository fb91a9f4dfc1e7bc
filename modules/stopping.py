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

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal."""
        self.asked = True

    def listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put ``note`` in place of the handler that Lightning has registered by now."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.note)

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = listen

    def stop(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **which: Any) -> None:
        """Stop where any rank is asked to (collective)."""
        if any(from_all_ranks([self.asked])):
            # the process that launched the others tells how the run ended; they end quietly, or it would be killed for them
            raise SIGTERMException(128 + signal.SIGTERM if trainer.local_rank == 0 else 0)

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = stop

"""Ends a run on a signal: all ranks together, after a whole step, with a checkpoint to resume from."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from modules.trainer.ranks import from_all_ranks
from modules.trainer.steps import BEGUN


class StopTogether(Callback):
    """Ends the run on SIGTERM or Ctrl-C, on all ranks together, with exit status 143 or 130.

    In a job of SLURM the signal that announces the time limit (SIGUSR1) does the same with status 138, and puts the job
    back into the queue, unless the Trainer's ``SLURMEnvironment`` says ``auto_requeue=False``.

    A fit ends after the current optimiser step, or inside a validation after its current batch, and writes
    ``last.ckpt`` beside its other checkpoints. Everything else ends after the current batch. A signal to one rank is
    enough, and a second signal ends the run at once. Lightning's own handler communicates as soon as the signal
    arrives, whatever the rank is doing, so that ranks may wait for each other for ever. This handler replaces it and
    only takes a note.

    Attributes:
        saved: the checkpoint that was written at the stop; None without one.

    Raises:
        SIGTERMException: on all ranks, after a signal to any of them.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal that this rank received
        self.saved: Path | None = None
        self.shared = 0.0  # batches of an evaluation or a prediction that all ranks still have ahead
        self._together = False  # whether all ranks stop

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal; stop at the second one."""
        if self.asked:
            raise SIGTERMException(128 + signum)
        self.asked = signum
        sys.stderr.write(
            f"\n{signal.Signals(signum).name}: the run stops after this step; a second signal stops it at once\n"
        )

    def listen(self, trainer: Trainer) -> None:
        """Replace the handlers that Lightning has registered by ``note``."""
        if threading.current_thread() is threading.main_thread():
            requeue = find_requeue_signal(trainer)
            if requeue is None and signal.getsignal(signal.SIGUSR1) is requeue_at_once:
                signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # auto_requeue=False
            for signum in (signal.SIGTERM, signal.SIGINT, *([] if requeue is None else [requeue])):
                signal.signal(signum, self.note)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        self.listen(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a whole step, if asked."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.stop(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals, and count the batches that every rank has (collective)."""
        self.listen(trainer)
        if trainer.predicting:
            batches = trainer.num_predict_batches
        elif trainer.testing:
            batches = trainer.num_test_batches
        else:
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self.shared = min(from_all_ranks([sum(batches)]))
        if self.shared == float("inf"):  # streams, whose number of batches is unknown
            self.shared = 0

    on_validation_start = on_test_start = on_predict_start = begin

    def end_batch(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **which: Any) -> None:
        """Stop after a batch, if any rank is asked; a rank stops alone when other ranks may have no batch left."""
        self.shared -= 1
        self.stop(trainer, together=self.shared >= 0)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = end_batch

    def stop(self, trainer: Trainer, together: bool = True) -> None:
        """Stop the run if any rank is asked (collective), or without ``together`` if this rank is."""
        asked = max(from_all_ranks([self.asked])) if together else self.asked
        if not asked:
            return
        self._together = together
        if trainer.training or (together and trainer.state.fn == "fit" and not trainer.sanity_checking):
            self.save(trainer)
        if asked == find_requeue_signal(trainer):
            requeue_job()
        # The process that launched the others reports how the run ended. The others end with status 0: a failure of
        # theirs would kill it.
        raise SIGTERMException(128 + asked if trainer.local_rank == 0 else 0)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint, if the run keeps checkpoints. A validation that it interrupts begins again on resume."""
        if trainer.validating:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.load_state_dict({**BEGUN, "is_last_batch": False})
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        folder = next((callback.dirpath for callback in savers if callback.dirpath), None)
        if folder is not None:
            self.saved = Path(folder) / "last.ckpt"
            trainer.save_checkpoint(self.saved, weights_only=False)
        rank_zero_info(
            f"stopped after step {trainer.global_step}; "
            + (f"{self.saved} resumes from it" if self.saved else "there is no checkpoint, as the run keeps none")
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Kill the processes that wait for a rank which stops alone."""
        launcher = trainer.strategy.launcher
        if isinstance(exception, SIGTERMException) and launcher is not None and not self._together:
            launcher.kill(signal.SIGKILL)


def find_requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """Return the signal by which SLURM announces the end of a job that it can requeue; None without such a job."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )


def find_job() -> str | None:
    """Return the id by which SLURM knows this job, which a requeued job keeps; None without SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def requeue_if_told() -> None:
    """Put a job of SLURM back into the queue when its time ends before the first step, with nothing to save."""
    if SLURMEnvironment.detect() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, requeue_at_once)


def requeue_at_once(signum: int, frame: FrameType | None) -> None:
    """Put the job back into the queue and end with the signal's exit status."""
    requeue_job()
    sys.exit(128 + signum)


@rank_zero_only
def requeue_job() -> None:
    """Put this job back into SLURM's queue; warn if that fails."""
    command = ["scontrol", "requeue", str(find_job())]
    try:
        failed = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = failed.stderr.strip() if failed.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        rank_zero_warn(f"{' '.join(command)} failed: {problem}")
    else:
        rank_zero_info(f"{' '.join(command)}: the job goes on when it runs again")

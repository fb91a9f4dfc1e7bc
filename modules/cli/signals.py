"""What SIGTERM and Ctrl-C do: a checkpoint at the next whole step, the command that resumes, an exit status."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from modules.cli.run_folder import CHECKPOINTS
from modules.cli.words import command


class Stopped(SystemExit):
    """The run was told to stop: exit status 128 + the signal's number, 143 for SIGTERM and 130 for Ctrl-C."""


class StopOnSignal(Callback):
    """Stops a fit behind the current optimiser step, on all ranks together, once one of them got SIGTERM or SIGINT.

    ``last.ckpt`` is written then, if checkpoints are. A second signal, or one outside of training, stops at once; what
    the last checkpoint holds is kept.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal
        self._trainer: Trainer | None = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from the Trainer, which would exit with status 0 or 1."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before the sanity check."""
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before the sanity check."""
        self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before the sanity check."""
        self._listen(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before the sanity check."""
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        if self.received or not self._trainer.training:
            raise Stopped(128 + number)
        self.received = number
        sys.stderr.write(f"\n{signal.Signals(number).name}: the run stops behind this step; once more: at once\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at a whole step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        stop = bool(self.received)
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            self._save(trainer)
            self.received = self.received or signal.SIGTERM
            raise Stopped(128 + self.received)

    def _save(self, trainer: Trainer) -> None:
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        folder = next((callback.dirpath for callback in savers if callback.dirpath), None)
        if folder is None:
            rank_zero_info(f"stopped behind step {trainer.global_step}; no checkpoint, as the run keeps none")
            return
        path = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(path)
        run = path.parent.parent
        saved = path.parent.name == CHECKPOINTS and (run / "config.yaml").is_file()
        what = ["--config", run / "config.yaml", "--ckpt_path", run] if saved else ["--ckpt_path", path]
        before = "" if saved else ", with the options of this run:"
        rank_zero_info(f"stopped behind step {trainer.global_step}; go on{before}: {command('fit', *what)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stopped at once: the processes that this one started would wait for it for ever."""
        launcher = trainer.strategy.launcher
        if isinstance(exception, Stopped) and launcher is not None and not self.received:
            launcher.kill(signal.SIGKILL)

"""The folder of a run, which the setting ``out`` names. No two runs share one, and a new run leaves old ones alone."""

import fcntl
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from modules.trainer.stopping import find_job

CHECKPOINTS = "checkpoints"
JOB = ".slurm"  # the job of SLURM that a folder belongs to, and its command
HELD = ("config.yaml", CHECKPOINTS, "export")  # a folder with one of these holds a run
SHARED = "LIGHTNING_ALIGN_OUT"  # environment variable that tells the folder to processes that this one starts


def choose_folder(method: str) -> Path:
    """Choose the folder of a run that names none.

    >>> choose_folder("OnlineDPOModule").as_posix()
    'runs/online_dpo'
    """
    name = method.rpartition(".")[2].removesuffix("Module")
    return Path("runs") / re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def find_last_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint in a run's folder; ``last.ckpt`` if the run writes it anew after every other
    checkpoint.
    """
    found, last = (folder / CHECKPOINTS).glob("*.ckpt"), folder / CHECKPOINTS / "last.ckpt"
    newest = max(found, key=lambda path: (path.stat().st_mtime, path == last, path.name), default=None)
    return last if newest is not None and last.is_file() and renews_last(newest) else newest


def renews_last(checkpoint: Path) -> bool:
    """Return whether the run that wrote a checkpoint also keeps ``last.ckpt``, whose numbers are all logged."""
    try:
        callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["callbacks"]
    except (OSError, RuntimeError, UnpicklingError, LookupError, EOFError, ValueError):  # a folder, or damaged
        return False
    return any(isinstance(state, dict) and state.get("last_model_path") for state in callbacks.values())


def find_own_run(out: Path, checkpoint: str | None) -> Path | None:
    """Find the folder of the run that wrote a checkpoint, if that run was named ``out``.

    Returns:
        the folder; None for a checkpoint of another run, from which a new run branches off.
    """
    if checkpoint is None:
        return None
    folder = Path(checkpoint).absolute().parent.parent
    own = is_run_of(folder, out) and Path(checkpoint).parent.name == CHECKPOINTS
    return out.with_name(folder.name) if own else None


def find_requeued_checkpoint(out: Path) -> Path | None:
    """Find the last checkpoint that this job of SLURM wrote by this command before it was put back into the queue."""
    folders = [mark.parent for mark in out.parent.glob(f"*/{JOB}") if mark.read_text() == describe_job()]
    found = [path for folder in folders if is_run_of(folder, out) and (path := find_last_checkpoint(folder))]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def is_requeued() -> bool:
    """Return whether this is a job of SLURM that runs again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def describe_job() -> str | None:
    """Return the job of SLURM and the command that runs in it; None without SLURM."""
    job = find_job()
    return job and f"{job} {shlex.join(sys.argv[1:])}\n"


def is_run_of(folder: Path, out: Path) -> bool:
    """Return whether a folder is ``out``, or one of ``out-2``, ``out-3`` and so on."""
    own = re.fullmatch(rf"{re.escape(out.name)}(-\d+)?", folder.name)
    return own is not None and folder.absolute().parent == out.absolute().parent


def count_outer_ranks() -> int:
    """Return how many processes another program, such as torchrun or srun, started for this run."""
    srun = os.environ.get("SLURM_NTASKS") if SLURMEnvironment.detect() else None
    return int(os.environ.get("WORLD_SIZE") or srun or 1)


class RunFolder:
    """A folder that belongs to this run until ``close``.

    A lock that ends with the process keeps other runs out. Processes that this one starts use the same folder.

    Args:
        out: the folder. If it holds a run or a run is using it, ``<out>-2`` is taken instead, and so on.
        resumes: take ``out`` itself and continue its run.

    Raises:
        ValueError: the folder cannot be made; or it is taken, and cannot be exchanged because the run resumes or shares
            it with processes that another program started.
    """

    def __init__(self, out: Path, resumes: bool = False) -> None:
        self._lock: TextIO | None = None
        self._made = False
        self.path = out = out if out.name else out.absolute()
        if getattr(rank_zero_only, "rank", 0) != 0:
            self.path = Path(os.environ.get(SHARED, out))
            return
        fixed = resumes or count_outer_ranks() > 1
        self.path = next(folder for folder in ([out] if fixed else count_up(out)) if self._take(folder, resumes, fixed))
        os.environ[SHARED] = str(self.path)
        if describe_job():
            (self.path / JOB).write_text(str(describe_job()))
        if self.path != out:
            rank_zero_info(f"out: {out} holds a run; this one goes to {self.path}")

    def _take(self, folder: Path, resumes: bool, fixed: bool) -> bool:
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("a")
        except OSError as error:
            raise ValueError(f"out: the folder '{folder}' cannot be written: {error.strerror}; name another") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            free = False
        else:
            if not is_there(lock):  # the run before has just removed the folder
                lock.close()
                return self._take(folder, resumes, fixed)
            self._lock, self._made, free = lock, made, True
        if free and (resumes or not any((folder / name).exists() for name in HELD)):
            return True
        if fixed:
            self._unlock()
            why = "holds a run" if free else "is in use by another run"
            raise ValueError(f"out: '{folder}' {why}; name another folder with --out")
        self._unlock()
        return False

    def close(self, keep: bool = True) -> None:
        """Release the folder; without ``keep``, remove it if this run made it."""
        if self._lock is None:
            return
        os.environ.pop(SHARED, None)
        if self._made and not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            (Path(self._lock.name)).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def is_there(file: TextIO) -> bool:
    """Return whether an open file is still the one under its name."""
    path = Path(file.name)
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def count_up(out: Path) -> Iterator[Path]:
    """Count up ``out``, ``out-2``, ``out-3`` and so on."""
    yield out
    number = 2
    while True:
        yield out.with_name(f"{out.name}-{number}")
        number += 1


class KeepsFolder(Callback):
    """Releases a run's folder at the end, and removes it if the run failed before its first step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._began = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note that there is something to keep."""
        self._began = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the folder of a run that failed, after its loggers have written what they hold.

        A logger that cannot write is removed, because Lightning would finalize it again and its error would hide the
        run's.
        """
        for logger in list(trainer.loggers):
            try:
                logger.finalize("failed")
            except OSError:
                trainer.loggers = [other for other in trainer.loggers if other is not logger]
        self.folder.close(keep=self._began or isinstance(exception, FloatingPointError))  # whose rows lie there

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folder."""
        self.folder.close()


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, or beside the logs, at the first batch.

    A run that is refused before its first batch leaves the file of an earlier run alone. Without a folder and a logger
    nothing is written. ``ckpt_path`` is left out, because the file describes the run and not where it was resumed.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet, since the run may still be refused."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the file once."""
        if self.already_saved or not (self.config.get("out") or trainer.loggers):
            return
        self.config = self.config.clone()
        self.config["ckpt_path"] = None
        if not self.config.get("out"):
            super().setup(trainer, pl_module, "fit")
        elif trainer.is_global_zero:
            self.parser.save(
                self.config, str(Path(self.config["out"]) / self.config_filename), skip_none=False, overwrite=True
            )
        self.already_saved = True

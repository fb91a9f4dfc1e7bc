"""Writes the trained model as a Hugging Face folder, which the next stage or any other tool can load."""

import shutil
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from callbacks.phase import require_period
from callbacks.writers.output_files import in_run_folder, require_writable


@runtime_checkable
class Exports(Protocol):
    """A module that can write itself as a Hugging Face folder."""

    def prepare_export(self) -> None:
        """Do what all ranks must do together; called on all ranks before ``save_pretrained`` (collective)."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the model and its tokenizer into an existing folder; called on rank zero alone."""


class Export(Callback):
    """Exports the final weights when a fit succeeds.

    The folder is replaced as a whole: the old export stays until the new one is complete. Nothing is written after an
    exception or by a ``fast_dev_run``.

    Args:
        folder: where to write; its parent folders are made and an earlier export is replaced. None = ``export`` in the
            run's folder.
        every_n_epochs: also export every n epochs, at least 1; None = only at the end.

    Raises:
        ValueError: ``every_n_epochs`` is below 1; in ``setup``, when the module cannot write itself, the folder holds
            something else or cannot be written, or a ``WeightAveraging`` comes later in the list of callbacks.
    """

    def __init__(self, folder: str | None = None, every_n_epochs: int | None = None) -> None:
        if every_n_epochs is not None:
            require_period("every_n_epochs", every_n_epochs)
        self._given = None if folder is None else Path(folder)
        self.folder = self._given or Path("export")  # settled at setup
        self.every_n_epochs = every_n_epochs
        self.exported_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that holds something else, and put back an export that a killed run had moved away."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Exports):
            raise ValueError(
                f"Export: {type(pl_module).__name__} lacks save_pretrained or prepare_export, so it cannot be written: "
                "remove the callback."
            )
        self.folder = in_run_folder(trainer, self._given, "export")
        if self.folder.is_file() or (
            self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "config.json").is_file()
        ):
            raise ValueError(
                f"Export would replace {self.folder}, which is not a Hugging Face folder (no config.json): choose "
                "another folder."
            )
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            require_writable(self.folder, "Export")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Trainer sets it without declaring it
        if any(isinstance(behind, WeightAveraging) for behind in callbacks[callbacks.index(self) :]):
            raise ValueError(
                "Export would write the weights before they are averaged: list WeightAveraging before Export in "
                "trainer.callbacks."
            )
        if trainer.is_global_zero and self._aside.is_dir() and not self.folder.exists():
            self._aside.rename(self.folder)  # a run was killed between the two renames of _write

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export every n epochs."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final weights, unless the last epoch did."""
        if self.exported_step != trainer.global_step:
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        module = cast(Exports, pl_module)
        module.prepare_export()
        if trainer.is_global_zero:
            self._write(module)
        self.exported_step = trainer.global_step
        trainer.strategy.barrier("export")

    def _write(self, model: Exports) -> None:
        partial = self._sibling("partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            model.save_pretrained(partial)
            mode = (partial / "config.json").stat().st_mode
            for file in partial.rglob("*.safetensors"):
                file.chmod(mode)  # safetensors lets only the owner read, whatever the umask
            shutil.rmtree(self._aside, ignore_errors=True)
            if self.folder.exists():
                self.folder.rename(self._aside)
            partial.rename(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self._aside, ignore_errors=True)

    @property
    def _aside(self) -> Path:
        return self._sibling("previous")

    def _sibling(self, suffix: str) -> Path:
        """Return a hidden name beside the folder. It is on the same disk, so that a rename is atomic."""
        folder = self.folder.absolute()
        return folder.with_name(f".{folder.name}.{suffix}")

"""Writes the trained model as a Hugging Face folder, which the next stage or any other tool can load."""

import shutil
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from callbacks.phase import require_period
from callbacks.writers.output_files import in_run_folder, require_writable
from modules.trainer.guard import require_finite
from modules.trainer.saving import naming, sync

MARK = ".written-by-export"  # file in an export that names the other files of the export


@runtime_checkable
class Exports(Protocol):
    """A module that can write itself as a Hugging Face folder."""

    def prepare_export(self) -> None:
        """Do what all ranks must do together; called on all ranks before ``save_pretrained`` (collective)."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the model and its tokenizer into an existing folder; called on rank zero alone."""


class Export(Callback):
    """Exports the final weights when a fit succeeds.

    The folder is replaced as a whole: the old export stays until the new one is complete and on the disk. Only an export
    is ever replaced. Nothing is written after an exception, by a ``fast_dev_run``, or of weights that are not finite.

    Args:
        folder: where to write; its parent folders are made and an earlier export is replaced. None = ``export`` in the
            run's folder.
        every_n_epochs: also export every n epochs, at least 1; None = only at the end.

    Raises:
        ValueError: ``every_n_epochs`` is below 1; in ``setup``, when the module cannot write itself, the folder holds
            something else or the run's own policy, or cannot be written, or a ``WeightAveraging`` comes later in the
            list of callbacks.
        OSError: the disk is full, for example; an earlier export is as it was.
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
        problem = self.explain_refusal(pl_module)
        if problem is not None:
            raise ValueError(f"Export would replace {self.folder}, {problem}: choose another folder, or move it away.")
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            require_writable(self.folder, "Export")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Trainer sets it without declaring it
        if any(
            isinstance(behind, WeightAveraging | StochasticWeightAveraging)
            for behind in callbacks[callbacks.index(self) :]
        ):
            raise ValueError(
                "Export would write the weights before they are averaged: list what averages them before Export in "
                "trainer.callbacks."
            )
        if trainer.is_global_zero and self._aside.is_dir() and not self.folder.exists():
            self._aside.rename(self.folder)  # a run was killed between the two renames of _write

    def explain_refusal(self, pl_module: LightningModule) -> str | None:
        """Return why the folder must not be replaced; None = it is an export, empty or not there.

        An export of an earlier version has no mark. It is known by its place, ``export`` in the folder of the run.
        """
        paths = {str(getattr(part, "path", "")) for part in pl_module.modules()} - {""}
        if any(Path(path).exists() and Path(path).resolve() == self.folder.resolve() for path in paths):
            return "from which this run reads a model"
        if not self.folder.exists():
            return None
        if not self.folder.is_dir():
            return "which is a file"
        found = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        if not found or (MARK not in found and self._given is None):
            return None
        if MARK not in found:
            return f"which no export has written (no {MARK} in it)"
        strange = found - set((self.folder / MARK).read_text(encoding="utf-8").splitlines()) - {MARK}
        return f"with files that no export has written ({', '.join(sorted(strange)[:3])})" if strange else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export every n epochs."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final weights, unless the last epoch did."""
        if self.exported_step != trainer.global_step:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the weights of a resumed run that had taken its last step already, for which no training begins."""
        if self.exported_step == -1 and trainer.global_step > 0:
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        require_finite([weight for weight in pl_module.parameters() if weight.requires_grad], "Export")
        module = cast(Exports, pl_module)
        module.prepare_export()
        if trainer.is_global_zero:
            self._write(module)
        self.exported_step = trainer.global_step
        trainer.strategy.barrier("export")

    def _write(self, model: Exports) -> None:
        partial = self._sibling("partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with naming(self.folder):
                partial.mkdir(parents=True)
                model.save_pretrained(partial)
                mode = (partial / "config.json").stat().st_mode
                files = [path for path in partial.rglob("*") if path.is_file()]
                names = sorted(path.relative_to(partial).as_posix() for path in files)
                (partial / MARK).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
                for file in files:
                    if file.suffix == ".safetensors":
                        file.chmod(mode)  # safetensors lets only the owner read, whatever the umask
                for path in (*files, partial / MARK, partial):
                    sync(path)
                shutil.rmtree(self._aside, ignore_errors=True)
                if self.folder.exists():
                    self.folder.rename(self._aside)
                partial.rename(self.folder)
                sync(self.folder.absolute().parent)
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

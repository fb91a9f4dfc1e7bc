"""Writes the trained model as a Hugging Face folder, which the next stage or any other tool can load."""

from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from callbacks.phase import require_period
from callbacks.writers.output_files import in_run_folder
from modules.trainer.exports import Origin, explain_occupied, find_origin, put_back, write_export
from modules.trainer.guard import require_finite
from modules.trainer.saving import require_writable


@runtime_checkable
class Exports(Protocol):
    """A module that can write itself as a Hugging Face folder."""

    def prepare_export(self) -> None:
        """Do what all ranks must do together; called on all ranks before ``save_pretrained`` (collective)."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the model and its tokenizer into an existing folder; called on rank zero alone."""


class Export(Callback):
    """Exports the final weights when a fit succeeds.

    The folder is replaced as a whole: the old export stays until the new one is complete and on the disk. Only an
    export is ever replaced. Nothing is written after an exception, by a ``fast_dev_run``, or when weights are not
    finite.

    ``lineage.json`` in the folder identifies the weights by a checksum and says which model the fit started from;
    ``HandOff`` reads it.

    Args:
        folder: where to write; its parent folders are made and an earlier export is replaced. None = ``export`` in the
            run's folder.
        every_n_epochs: also export every n epochs, at least 1; None = only at the end.

    Raises:
        ValueError: ``every_n_epochs`` is below 1; in ``setup``, when the module cannot write itself, the folder holds
            something else or the run's own policy, or cannot be written, or a ``WeightAveraging`` comes later in the
            list of callbacks.
        OSError: the disk is full, for example; an earlier export stays as it was.
    """

    def __init__(self, folder: str | None = None, every_n_epochs: int | None = None) -> None:
        if every_n_epochs is not None:
            require_period("every_n_epochs", every_n_epochs)
        self._given = None if folder is None else Path(folder)
        self.folder = self._given or Path("export")  # settled at setup
        self.every_n_epochs = every_n_epochs
        self.exported_step = -1
        self.start: Origin | None = None  # what the fit started from; None = the module names no policy

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
        if trainer.is_global_zero:
            put_back(self.folder)
            path = getattr(getattr(pl_module, "policy", None), "path", None)
            self.start = find_origin(path) if isinstance(path, str) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the model that the fit started from, for a resumed run."""
        return {} if self.start is None else {"policy": self.start.policy, "weights": self.start.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, because the files of that model may have changed since."""
        self.start = Origin(**state_dict) if state_dict else self.start

    def explain_refusal(self, pl_module: LightningModule) -> str | None:
        """Return why the folder must not be replaced; None = it is an export, is empty or does not exist.

        An export of an earlier version has no mark. It is known by its place, ``export`` in the folder of the run.
        """
        paths = {str(getattr(part, "path", "")) for part in pl_module.modules()} - {""}
        if any(Path(path).exists() and Path(path).resolve() == self.folder.resolve() for path in paths):
            return "from which this run reads a model"
        return explain_occupied(self.folder, may_lack_mark=self._given is None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export every n epochs."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final weights, unless the last epoch did."""
        if self.exported_step != trainer.global_step:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the weights of a run that resumes after its last step, because no training begins then."""
        if self.exported_step == -1 and trainer.global_step > 0:
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        require_finite([weight for weight in pl_module.parameters() if weight.requires_grad], "Export")
        module = cast(Exports, pl_module)
        module.prepare_export()
        if trainer.is_global_zero:
            parents = [] if self.start is None else [self.start]
            write_export(self.folder, module.save_pretrained, type(pl_module).__name__, parents)
        self.exported_step = trainer.global_step
        trainer.strategy.barrier("export")

"""How do several models compare? Each ``validate`` adds a column to one table."""

import json
import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.stages.summary import print_table, read_logged
from callbacks.writers.output_files import write_json


class Comparison(Callback):
    """Keeps a model's metrics in a JSON file and prints the table of all its models: a row per metric, a column per
    model.

    A standard error that was logged stands behind its value, as in ``0.84±0.03``. The table is written at the end of
    ``validate``; in ``fit`` the callback only gives the models of the file to ``Claims``. The file holds the metrics as
    logged, by model. A model of the same name is replaced and keeps its place. A ``fast_dev_run`` writes nothing.

    Args:
        name: this model's column.
        file: the JSON file; its parent folders are made.
        metrics: name of a row -> logged metric, such as ``{gold reward: val/pass@1}``.
        forgetting: the same for perplexities. A cell shows log(perplexity) - log(the first model's), in nats per token;
            above 0 = forgotten.

    Raises:
        ValueError: in ``setup``, in a command other than ``fit`` and ``validate``, or when ``file`` holds something
            else; after a validation that did not log one of the metrics.
    """

    def __init__(self, name: str, file: str, metrics: dict[str, str], forgetting: dict[str, str] | None = None) -> None:
        self.name, self.file = name, Path(file)
        self.metrics, self.forgetting = metrics, forgetting or {}
        self.found: dict[str, float] = {}  # this model's metrics, as logged

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a command that measures no model, and a file of another kind, before anything is measured."""
        claims = any(hasattr(callback, "claims") for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if stage != "validate" and not (stage == "fit" and claims):
            raise ValueError(
                f"Comparison keeps what validate measures, and this is {TrainerFn(stage).value}: remove it, or run "
                "validate with it"
            )
        read_models(self.file)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics."""
        if trainer.state.fn == "validate":
            self.found = read_logged(trainer, [*self.metrics.values(), *self.forgetting.values()], "Comparison")

    def models(self) -> dict[str, dict[str, float]]:
        """Return the logged metrics by model, with this model's once it is measured."""
        return read_models(self.file) | ({self.name: self.found} if self.found else {})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file and print the table, after Lightning's own results."""
        if stage != "validate" or not trainer.is_global_zero or not self.found:
            return
        models = self.models()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            write_json(self.file, models)
        errors = {model: find_errors(found, self.metrics) for model, found in models.items()}
        print_table([*self.metrics, *self.forgetting], choose_shown(models, self.metrics, self.forgetting), errors)


def read_models(file: Path) -> dict[str, dict[str, float]]:
    """Read the logged metrics by model, in the order in which the models were added; none without a file.

    Raises ValueError when the file holds something else.
    """
    if not file.exists():
        return {}
    try:
        models: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
        assert all(isinstance(value, float) for values in models.values() for value in values.values())
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"Comparison: {file} is not a file of metrics by model; delete it, or name another file"
        ) from error
    return models


def choose_shown(
    models: dict[str, dict[str, float]], metrics: dict[str, str], forgetting: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Return the columns of the table, each as name of a row -> value.

    Perplexities of 2 and 4 give a forgetting of 0 and log(4) - log(2) = 0.69.
    """
    first = next(iter(models.values()))
    columns = {}
    for model, found in models.items():
        columns[model] = {row: found[name] for row, name in metrics.items() if name in found}
        columns[model] |= {
            row: math.log(found[name] / first[name])
            for row, name in forgetting.items()
            if name in found and name in first
        }
    return columns


def find_errors(found: dict[str, float], metrics: dict[str, str]) -> dict[str, float]:
    """Return the standard errors that a model's validation logged, by name of a row."""
    return {row: found[f"{name}_standard_error"] for row, name in metrics.items() if f"{name}_standard_error" in found}

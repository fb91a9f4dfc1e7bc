"""How do several models compare? Each ``validate`` adds a column to one table."""

import json
import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.stages.summary import print_table, read_logged
from callbacks.writers.output_files import write_json


class Comparison(Callback):
    """At the end of ``validate``, keeps the model's numbers in a JSON file and prints those of all models in it: rows =
    metrics, columns = models.

    The file holds the metrics as logged, by model; the numbers of a model of the same name are replaced, where they
    stand. A ``fast_dev_run`` writes nothing.

    Args:
        name: of this model, its column.
        file: JSON, written whole; its parents are made.
        metrics: what its row is called -> the logged metric, such as ``{gold reward: val/pass@1}``.
        forgetting: the same of perplexities, shown as log(perplexity) - log(the first model's), nats per token: above 0
            = forgotten.

    Raises:
        ValueError: in ``setup``, a ``file`` that is no such JSON; after a validation that did not log one of the
            metrics.
    """

    def __init__(self, name: str, file: str, metrics: dict[str, str], forgetting: dict[str, str] | None = None) -> None:
        self.name, self.file = name, Path(file)
        self.metrics, self.forgetting = metrics, forgetting or {}
        self.found: dict[str, float] = {}  # of this model, by logged name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another kind of file before anything is measured."""
        if stage == "validate":
            read(self.file)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the values."""
        if trainer.state.fn == "validate":
            self.found = read_logged(trainer, [*self.metrics.values(), *self.forgetting.values()], "Comparison")

    def models(self) -> dict[str, dict[str, float]]:
        """Logged metrics by model, this one's included when it has been measured."""
        return read(self.file) | ({self.name: self.found} if self.found else {})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write and print, behind Lightning's own results."""
        if stage != "validate" or not trainer.is_global_zero or not self.found:
            return
        models = self.models()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            write_json(self.file, models)
        print_table([*self.metrics, *self.forgetting], shown(models, self.metrics, self.forgetting))


def read(file: Path) -> dict[str, dict[str, float]]:
    """Logged metrics by model, in the order in which the models came; none without a file. ValueError for another kind
    of file.
    """
    if not file.exists():
        return {}
    try:
        models: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
        assert all(isinstance(value, float) for values in models.values() for value in values.values())
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"Comparison: {file} holds no numbers by model and metric; delete it, or name another file"
        ) from error
    return models


def shown(
    models: dict[str, dict[str, float]], metrics: dict[str, str], forgetting: dict[str, str]
) -> dict[str, dict[str, float]]:
    """The columns of the table by row name; perplexities 2 and 4 are a forgetting of 0 and log 2 = 0.69."""
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

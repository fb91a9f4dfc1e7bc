"""What did training change? Prints one table and one line at the end of ``validate``."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.writers.output_files import write_whole

PROMPTS = "val/num_prompts"  # how many prompts the shares and means are over
WIDE = 200  # columns of a table that is printed without a terminal


class Summary(Callback):
    """Prints the validation before training beside the validation of the trained checkpoint.

    "Before" is the sanity check of the first ``fit``, if it runs over all validation data
    (``Trainer(num_sanity_val_steps=-1)``). Its metrics are kept in the checkpoint. ``validate`` with that checkpoint
    prints the table, the command that opens TensorBoard, and last ``title: metric before -> after``.

    Args:
        title: the first words of the last line.
        headline: the metric on the last line, such as ``val/pass@1``. It is also the table's first row.
        metrics: the other rows.
        result: a file to write the headline's value into, for scripts; None = no file.

    Raises:
        ValueError: a validation did not log one of the metrics.
    """

    def __init__(self, title: str, headline: str, metrics: list[str], result: str | None = None) -> None:
        self.title = title
        self.result = result
        self.headline = headline
        self.metrics = list(dict.fromkeys([headline, *metrics]))
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics: "before" from the sanity check, "after" from ``validate``."""
        if trainer.state.fn == "validate":
            self.after = read_logged(trainer, self.metrics, "Summary")
        elif trainer.sanity_checking and trainer.num_sanity_val_steps == float("inf") and not self.before:
            self.before = read_logged(trainer, self.metrics, "Summary")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print at the end of ``validate``."""
        # Lightning prints its own results before this hook, so the headline is the last line.
        if stage == "validate" and trainer.is_global_zero and self.after:
            self._print(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run or a validation needs."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.before = state_dict["before"]

    def _print(self, trainer: Trainer) -> None:
        if self.result is not None:
            Path(self.result).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(self.result), f"{show_rounded(self.after[self.headline])}\n")
        print_table(self.metrics, ({"before": self.before} if self.before else {}) | {"after": self.after})
        if not self.before and trainer.ckpt_path:
            print(
                "The values before training are unknown: fit with --trainer.num_sanity_val_steps -1 and validate with "
                "that run's checkpoint."
            )
        print(f"tensorboard --logdir {shlex.quote(_log_folder(trainer))}")
        values = [state[self.headline] for state in (self.before, self.after) if self.headline in state]
        print(
            f"{self.title}: {self.headline.removeprefix('val/')} "
            f"{' -> '.join(show_rounded(value) for value in values)}",
            flush=True,
        )


def read_logged(trainer: Trainer, names: Sequence[str], owner: str) -> dict[str, float]:
    """Return metrics of the last validation, with the number of prompts and the standard errors that it logged.

    Raises ValueError, which begins with ``owner``, when one of the names was not logged.
    """
    missing = [name for name in names if name not in trainer.callback_metrics]
    if missing:
        raise ValueError(
            f"{owner} is asked for {missing}, which validation did not log; it logged "
            f"{sorted(trainer.callback_metrics)}."
        )
    extras = [PROMPTS, *(f"{name}_standard_error" for name in names)]
    kept = dict.fromkeys([*names, *(name for name in extras if name in trainer.callback_metrics)])
    return {name: float(trainer.callback_metrics[name]) for name in kept}


def print_table(
    rows: Sequence[str],
    columns: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Print one row per metric and one column per model. A cell without a value stays empty.

    Args:
        rows: names of the rows.
        columns: model -> row -> value.
        errors: model -> row -> standard error, which stands behind its value.
    """
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in ("metric", *columns)))
    for name in rows:
        cells = []
        for model, values in columns.items():
            error = (errors or {}).get(model, {}).get(name)
            behind = "" if error is None else f"±{show_rounded(error)}"
            cells.append(show_rounded(values[name]) + behind if name in values else "")
        table.add_row(name, *cells)
    console = Console()
    (console if console.is_terminal else Console(width=WIDE)).print(table)


def show_rounded(value: float) -> str:
    """Format a value with two decimals."""
    return f"{value:.2f}"


def _log_folder(trainer: Trainer) -> str:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return str(loggers[0].save_dir if loggers else trainer.default_root_dir)

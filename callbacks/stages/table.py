"""Metrics of a validation by name, and a table of them."""

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer

PROMPTS = "val/num_prompts"  # of which shares and means were taken


def logged(trainer: Trainer, names: Sequence[str], owner: str) -> dict[str, float]:
    """The values of the last validation, with their number of prompts and their standard errors where it logged these.

    Raises ValueError, in the name of ``owner``, where it did not log one of the names.
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


def print_table(rows: Sequence[str], columns: Mapping[str, Mapping[str, float]]) -> None:
    """One row a metric, one column a model; what a model has no value of stays empty."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", *columns)
    for name in rows:
        table.add_row(name, *(rounded(values[name]) if name in values else "" for values in columns.values()))
    Console().print(table)


def rounded(value: float) -> str:
    """Two digits behind the point."""
    return f"{value:.2f}"

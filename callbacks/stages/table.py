"""Reads the metrics of a validation and prints them as a table."""

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer

PROMPTS = "val/num_prompts"  # the prompts that shares and means were taken over


def logged(trainer: Trainer, names: Sequence[str], owner: str) -> dict[str, float]:
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


def print_table(rows: Sequence[str], columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print one row per metric and one column per model. A cell without a value stays empty."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", *columns)
    for name in rows:
        table.add_row(name, *(rounded(values[name]) if name in values else "" for values in columns.values()))
    Console().print(table)


def rounded(value: float) -> str:
    """Format a value with two decimals."""
    return f"{value:.2f}"

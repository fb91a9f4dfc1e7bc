"""What a fit says at its end: its numbers, where the model is, how to ask it, how to see the curves."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from modules.cli.progress import numbers
from modules.cli.words import command, from_here

SHOWN = 6  # numbers on the first line


def what_next(trainer: Trainer, export: Path | None) -> list[str]:
    """Three lines: results and export, how to ask the model, how to see the curves.

    Args:
        trainer: of the fit that has ended.
        export: the folder of the exported model, None where nothing was exported.
    """
    logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    logged = logged or {name: value for name, value in trainer.logged_metrics.items() if name.startswith("train/")}
    shown: dict[str, Any] = dict(sorted(logged.items(), key=lambda item: (rank(item[0]), item[0]))[:SHOWN])
    where = f"model: {from_here(export)}" if export else "no model exported: list Export in trainer.callbacks"
    lines = [f"step {trainer.global_step}: {numbers(shown) or 'nothing logged'}; {where}"]
    if export:
        lines.append(f"ask it: {command('chat', '--policy', export)}")
    folder = next((logger.save_dir for logger in trainer.loggers if logger.save_dir), None)
    if folder and any(type(logger).__name__ == "TensorBoardLogger" for logger in trainer.loggers):
        lines.append(f"curves: {command('--logdir', Path(folder), module='tensorboard.main')}")
    elif folder:
        lines.append(f"curves: {from_here(Path(folder))}")
    return lines


def rank(name: str) -> int:
    """Which numbers come first: what is right, rewards, then the loss."""
    wanted = ("pass@1", "reward", "accuracy", "rewards/accuracies", "loss")
    short = name.partition("/")[2]
    return wanted.index(short) if short in wanted else len(wanted)

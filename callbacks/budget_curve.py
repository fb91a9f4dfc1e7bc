"""Does thinking longer help?"""

import math
import re
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.phase import find_tensorboards, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC = re.compile(r"budget/(\d+)/(accuracy|accuracy_standard_error|length)")


@runtime_checkable
class HasBudgets(Protocol):
    """A module that answers held-out prompts at several thinking budgets."""

    val_budgets: list[int]


class BudgetCurve(Callback):
    """Draws and prints the accuracy on held-out prompts against the thinking budget, at the end of each evaluation.

    The module measures it at ``model.validation.budgets``, and logs for each budget ``val/budget/<tokens>/accuracy``,
    its ``accuracy_standard_error`` over prompts and the ``length`` of the completions in tokens. ``val/budget/rise`` is
    the accuracy at the largest budget minus that at the smallest. A policy whose thoughts help has a curve that rises.

    Raises:
        ValueError: in ``setup``, when there is no budget to measure.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that measures no budgets."""
        if not isinstance(pl_module, HasBudgets) or not pl_module.val_budgets:
            raise ValueError(
                "BudgetCurve draws accuracy against thinking budgets, and there are none: set model.validation.budgets "
                "of a method that samples, or remove the callback"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and print what the validation measured."""
        self.show(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same for ``test``."""
        self.show(trainer, "test")

    def show(self, trainer: Trainer, stage: str) -> None:
        """Draw and print the curve of a finished evaluation; the sanity check before a fit draws nothing."""
        if trainer.sanity_checking:
            return
        curve: dict[int, dict[str, float]] = {}
        for name, value in trainer.callback_metrics.items():
            found = METRIC.fullmatch(name.removeprefix(f"{stage}/"))
            if found is not None and name.startswith(stage):
                curve.setdefault(int(found[1]), {})[found[2]] = float(value)
        curve = dict(sorted(curve.items()))
        lines = [
            f"{budget:>8}  {point['accuracy']:8.3f}  {point.get('accuracy_standard_error', math.nan):6.3f}  "
            f"{point['length']:10.1f}"
            for budget, point in curve.items()
        ]
        rank_zero_info("\n".join(["budget    accuracy    s.e.  all tokens", *lines]))
        for logger in find_tensorboards(trainer):
            figure = new_figure()
            draw_curve(figure, curve)
            logger.experiment.add_figure(f"{stage}/budget", figure, global_step=trainer.global_step)


def draw_curve(figure: "Figure", curve: dict[int, dict[str, float]]) -> None:
    """Plot accuracy against budget, with a bar of one standard error on each side."""
    axes = figure.subplots()
    accuracies = [point["accuracy"] for point in curve.values()]
    errors = [point.get("accuracy_standard_error", 0.0) for point in curve.values()]
    axes.errorbar(list(curve), accuracies, yerr=errors, marker="o", markersize=3, capsize=2)
    axes.set(xlabel="thinking budget, tokens", ylabel="accuracy", ylim=(-0.02, 1.02))

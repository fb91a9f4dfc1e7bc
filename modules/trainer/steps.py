"""Optimiser steps of a run: how many it has, and how it resumes from a whole one."""

import math
from collections.abc import Sized
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def count_updates(trainer: Trainer) -> float:
    """Count the optimiser updates of the whole run, from its start. The count is infinite if nothing bounds them.

    ``trainer.estimated_stepping_batches`` says the same, but reading it makes Lightning forget the loaders' state on
    resume.
    """
    limit = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if trainer.max_epochs in (None, -1) or not math.isfinite(trainer.num_training_batches):
        return limit
    return min(limit, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * trainer.max_epochs)


def check_whole_steps(trainer: Trainer) -> None:
    """Refuse settings that cut an optimiser step short, for its ``denominator`` counts all that was planned for it.

    A ``fast_dev_run``, which keeps nothing, may cut.

    Raises:
        ValueError: ``limit_train_batches`` ends an epoch inside a step, or a callback changes the accumulation.
    """
    accumulate, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "GradientAccumulationScheduler changes the micro-batches of an optimiser step during the run, and the data "
            f"are planned for trainer.accumulate_grad_batches ({accumulate}): leave the callback out"
        )
    try:
        limited = batches < len(cast(Sized, trainer.train_dataloader))
    except TypeError:  # a stream has no length
        limited = math.isfinite(batches)
    if limited and batches % accumulate and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        whole = max(1, round(batches / accumulate)) * accumulate
        raise ValueError(
            f"trainer.limit_train_batches ends an epoch after {batches} micro-batches, and an optimiser step has "
            f"{accumulate} (accumulate_grad_batches), so it would cut a step: set it to {whole}"
        )


def rewind_to_whole_step(loop: dict[str, Any], accumulate: int, validates: bool, by_steps: bool) -> None:
    """Change the Trainer's saved loop state, in place, so that the run resumes exactly.

    * Saved inside an accumulation, it goes back to the last optimiser step, since no checkpoint holds gradients. The
      DataModules do the same.
    * Saved after the last micro-batch of an epoch, Lightning 2.6 would skip the validation and the end of that epoch,
      and so its metrics. The micro-batch is therefore marked as completed, and the validation as begun.
    * Saved at the end of an epoch, a run that is limited by steps would end that epoch a second time. The next epoch is
      therefore put at its start.

    Args:
        loop: the checkpoint's ``fit_loop``.
        accumulate: micro-batches of an optimiser step.
        validates: whether a validation follows the saved epoch.
        by_steps: whether the run is limited by steps and not by epochs.
    """
    progress, steps, restarts_epoch = loop["epoch_loop.batch_progress"], loop["epoch_loop.state_dict"], False
    current, total = progress["current"], progress["total"]
    extra = 0 if progress["is_last_batch"] else current["ready"] % accumulate
    if extra:
        whole = current["ready"] - extra
        for name in current:
            total[name] -= current[name] - whole
            current[name] = whole
        restarts_epoch = whole == 0
    elif progress["is_last_batch"] and current["completed"] == current["processed"] - 1:
        current["completed"] += 1
        total["completed"] += 1
        if validates:
            validation = loop["epoch_loop.val_loop.batch_progress"]
            validation["current"] = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
            validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        else:
            steps["_batches_that_stepped"] += 1  # what follows a validation would have counted the step
    epoch = loop["epoch_progress"]
    if epoch["current"]["completed"] == epoch["current"]["processed"] - 1:  # saved at the very end of an epoch
        for part in ("current", "total"):
            epoch[part]["completed"] += 1
        progress["current"] = dict.fromkeys(current, 0)
        progress["is_last_batch"] = False
        restarts_epoch = by_steps
    if restarts_epoch and validates:
        steps["_batches_that_stepped"] -= 1  # the loop will count a step before the first micro-batch

"""Optimiser steps of a run: how many it has, and how it resumes from a whole one."""

import copy
import math
from collections.abc import Sized
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

# The progress of a validation that has begun without a batch; Lightning runs it from its start on resume.
BEGUN = {
    "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
}


def count_updates(trainer: Trainer) -> float:
    """Count the optimiser updates of the whole run, from its start. The count is infinite if nothing bounds them.

    ``trainer.estimated_stepping_batches`` says the same, but reading it makes Lightning forget the loaders' state on
    resume.
    """
    limit = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if trainer.max_epochs in (None, -1) or not math.isfinite(trainer.num_training_batches):
        return limit
    return min(limit, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * trainer.max_epochs)


def update_of_prompts(num_prompts: int, updates: int) -> list[int]:
    """Return the update of a pass, 0 to ``updates`` - 1, that trains on each of a rank's prompts: stretches of like length,
    in the order of drawing.
    """
    return [update for update, stretch in enumerate(torch.arange(num_prompts).tensor_split(updates)) for _ in stretch]


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the micro-batch that has just been trained on."""
    loop = trainer.fit_loop
    done = loop.epoch_loop.batch_progress.current
    if loop._data_fetcher is None or done.completed != done.processed - 1:  # type: ignore[attr-defined]
        return False
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def refuse_blind_monitors(trainer: Trainer) -> None:
    """Raise ValueError if a callback or a scheduler watches a metric of the validation, and the run has none."""
    loaders = trainer.val_dataloaders  # None = not made yet
    if trainer.enable_validation and (loaders is None or sum(trainer.num_val_batches) > 0):
        return
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    watching = [(type(each).__name__, getattr(each, "monitor", None)) for each in callbacks]
    watching += [(type(each.scheduler).__name__, each.monitor) for each in trainer.lr_scheduler_configs]
    for name, monitor in watching:
        if str(monitor).startswith("val/"):
            raise ValueError(
                f"{name} watches {monitor}, and this run has no validation: set data.val and a trainer.limit_val_batches "
                "above 0, or watch a metric such as train/loss"
            )


def epoch_is_whole(trainer: Trainer) -> bool:
    """Return, at the end of an epoch, whether it has trained on its last batch; ``max_steps`` may end it before."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def check_whole_steps(trainer: Trainer) -> None:
    """Refuse settings that cut an optimiser step short, because its ``denominator`` counts all that was planned for it.

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


def rewind_to_whole_step(loop: dict[str, Any], accumulate: int, validates: bool, due: bool, by_steps: bool) -> None:
    """Change the Trainer's saved loop state, in place, so that the run resumes exactly.

    * Saved inside an accumulation, it goes back to the last optimiser step, since no checkpoint holds gradients. The
      DataModules do the same.
    * Saved before a validation, or after the last micro-batch of an epoch, Lightning 2.6 would skip the validation and
      the end of that epoch, and so its metrics. The micro-batch is therefore marked as completed, and the validation as
      begun.
    * Saved by a run that reached ``max_steps`` inside an epoch, the rest of that epoch would be skipped. The epoch is
      therefore marked as running.
    * Saved at the end of an epoch, a run that is limited by steps would end that epoch a second time. The next epoch is
      therefore put at its start.

    Args:
        loop: the checkpoint's ``fit_loop``.
        accumulate: micro-batches of an optimiser step.
        validates: whether the saved epoch has a validation.
        due: whether a validation follows the saved micro-batch.
        by_steps: whether the run is limited by steps and not by epochs.
    """
    progress, steps, restarts_epoch = loop["epoch_loop.batch_progress"], loop["epoch_loop.state_dict"], False
    current, total, epoch = progress["current"], progress["total"], loop["epoch_progress"]
    if (
        current["ready"]
        and not progress["is_last_batch"]
        and epoch["current"]["ready"] == epoch["current"]["processed"]
    ):
        steps["_batches_that_stepped"] += epoch["current"]["processed"] - epoch["current"]["completed"] - 1
        for part in ("current", "total"):
            progress[part]["completed"] -= 1  # as behind the micro-batch, whose validation is over
            epoch[part]["processed"] -= 1
            epoch[part]["completed"] = epoch[part]["processed"]
        due = False
    extra = 0 if progress["is_last_batch"] else current["ready"] % accumulate
    if extra:
        whole = current["ready"] - extra
        for name in current:
            total[name] -= current[name] - whole
            current[name] = whole
        restarts_epoch = whole == 0
    elif (progress["is_last_batch"] or due) and current["completed"] == current["processed"] - 1:
        current["completed"] += 1
        total["completed"] += 1
        if due:
            loop["epoch_loop.val_loop.batch_progress"] |= copy.deepcopy(BEGUN)
        else:
            steps["_batches_that_stepped"] += 1  # what follows a validation would have counted the step
    if epoch["current"]["completed"] == epoch["current"]["processed"] - 1:  # saved at the very end of an epoch
        for part in ("current", "total"):
            epoch[part]["completed"] += 1
        progress["current"] = dict.fromkeys(current, 0)
        progress["is_last_batch"] = False
        restarts_epoch = by_steps
    if restarts_epoch and validates:
        steps["_batches_that_stepped"] -= 1  # the loop will count a step before the first micro-batch

"""Optimiser steps of a run: how many it has, and how it resumes from a whole one."""

import math
from typing import Any

from lightning.pytorch import Trainer


def count_updates(trainer: Trainer) -> float:
    """Count the optimiser updates of the whole run, from its start; infinite where nothing bounds them.

    ``trainer.estimated_stepping_batches`` would say the same, but asking for it makes Lightning forget the state of the
    loaders on resume.
    """
    limit = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if trainer.max_epochs in (None, -1) or not math.isfinite(trainer.num_training_batches):
        return limit
    return min(limit, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * trainer.max_epochs)


def rewind_to_whole_step(loop: dict[str, Any], accumulate: int, validates: bool, by_steps: bool) -> None:
    """Make the Trainer's saved loop state, in place, one from which it resumes exactly.

    Inside an accumulation it goes back to the last optimiser step, since no checkpoint holds gradients (the DataModules
    do the same). Saved behind the last micro-batch of an epoch, Lightning 2.6 would skip that epoch's validation and
    end, and with them its
    metrics: so the micro-batch is marked as completed, and the validation, if the epoch ``validates``, as begun. Saved
    at the end of an epoch, a run limited ``by_steps`` would end that epoch once more: so the next one is put at its
    start.
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

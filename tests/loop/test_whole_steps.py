"""An optimiser step is whole: what would cut it is refused, because its denominator counts all that it was to see."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from datamodules import Addition, AdditionPairs, PreferenceDataModule, VerifiableDataModule
from modules import DPOModule, GRPOModule
from modules.rewards import NumericMatch
from modules.rollout.sampling import Sampling

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0}


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def fit_dpo(**settings) -> int:
    """Run over 10 micro-batches of 2 pairs, or as many as the settings leave; return the optimiser steps."""
    module, trainer = DPOModule("tiny", optimizer=sgd), Trainer(**QUIET | settings)
    trainer.fit(module, PreferenceDataModule(module.tokenizer, AdditionPairs(20), batch_size=2))
    return trainer.global_step


def fit_grpo(**settings) -> int:
    """Run one phase of one update."""
    module = GRPOModule("tiny", NumericMatch(), 2, Sampling(max_completion_length=2), optimizer=sgd, beta=0.1)
    trainer = Trainer(**QUIET | settings)
    trainer.fit(module, VerifiableDataModule(module.tokenizer, Addition(8), prompts_per_phase=4))
    return trainer.global_step


@pytest.mark.parametrize(
    ("fit", "settings", "message"),
    [
        (fit_dpo, {"limit_train_batches": 6}, "after 6 micro-batches, and an optimiser step has 4.*set it to 8"),
        (fit_dpo, {"limit_train_batches": 0.55}, "after 5 micro-batches.*set it to 4"),
        (fit_dpo, {"limit_train_batches": 1}, "after 1 micro-batches.*set it to 4"),
        (fit_grpo, {"limit_train_batches": 2}, "after 2 micro-batches.*set it to 4"),
        (fit_dpo, {"callbacks": [GradientAccumulationScheduler({1: 4})]}, "leave the callback out"),
        (fit_grpo, {"callbacks": [GradientAccumulationScheduler({1: 4})]}, "leave the callback out"),
    ],
)
def test_what_cuts_a_step_is_refused(fit, settings, message):
    accumulate = 1 if "callbacks" in settings else 4
    with pytest.raises(ValueError, match=message):
        fit(accumulate_grad_batches=accumulate, **settings)


def test_limits_of_whole_steps_and_a_short_last_step_are_kept():
    assert fit_dpo(accumulate_grad_batches=4) == 3  # of 4, 4 and 2 micro-batches, as planned
    assert fit_dpo(accumulate_grad_batches=4, limit_train_batches=8) == 2
    assert fit_dpo(accumulate_grad_batches=4, limit_train_batches=0.8) == 2
    assert fit_dpo(accumulate_grad_batches=4, limit_train_batches=10) == 3
    assert fit_dpo(accumulate_grad_batches=4, fast_dev_run=True) == 1

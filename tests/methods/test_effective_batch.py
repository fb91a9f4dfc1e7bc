"""The effective batch: how many completions an update learns from, over its micro-batches."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import Addition, VerifiableDataModule
from modules import GRPOModule, OnlineDPOModule
from modules.rollout.sampling import Sampling
from modules.types import Reward

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class FirstOfEveryOtherGroup(Reward):
    """1 for the first completion of groups 0, 2, 4, ..., else 0; in groups 4, 8, ... the last one cannot be scored."""

    name = "first"

    def __call__(self, rollouts):
        scores, place = [], 0
        for i, rollout in enumerate(rollouts):
            place = place + 1 if i and rollouts[i - 1].group == rollout.group else 0
            scores.append(
                None if place == 3 and rollout.group in (4, 8) else float(place == 0 and rollout.group % 2 == 0)
            )
        return scores


# groups 0, 2 and 4 of six differ, of four completions each; in group 4 one has no score
CASES = [(GRPOModule, {}, 4 + 4 + 3), (GRPOModule, {"beta": 0.1}, 4 + 4 + 3), (OnlineDPOModule, {}, 3 * 2)]


@pytest.mark.parametrize(
    "accumulate", [1, 4]
)  # four micro-batches: more than there are pairs, and with the KL every completion is in one
@pytest.mark.parametrize(("method", "settings", "expected"), CASES)
def test_effective_batch_counts_what_the_reward_teaches(method, settings, expected, accumulate):
    seed_everything(0)
    settings = {"num_generations": 4, "sampling": Sampling(max_completion_length=4)} | settings
    module = method(
        "tiny", FirstOfEveryOtherGroup(), optimizer=lambda parameters: torch.optim.SGD(parameters), **settings
    )
    trainer = Trainer(**QUIET, max_epochs=1, enable_checkpointing=False, accumulate_grad_batches=accumulate)
    trainer.fit(module, VerifiableDataModule(module.tokenizer, Addition(50), prompts_per_phase=6))
    assert float(trainer.callback_metrics["train/effective_batch"]) == expected
    assert float(trainer.callback_metrics["train/frac_reward_zero_std"]) == 3 / 6

"""Each method raises its objective within a fixed budget, and the controls do not."""

import random
from functools import cache

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import Addition, InstructionDataModule, VerifiableDataModule
from modules import GRPOModule, SFTModule
from modules.generation import Validation
from modules.losses import (
    CISPO,
    DPPO,
    GSPO,
    REINFORCE,
    RLOO,
    SAPO,
    Advantage,
    Centered,
    Clipped,
    GSPOToken,
    LeaveOneOut,
    MaxRL,
    MirrorDescent,
    PolicyObjective,
    REINFORCEPlusPlus,
)
from modules.rewards import RegexFormat
from modules.rollout.sampling import Sampling
from modules.types import Reward

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
ASCII = RegexFormat(r"[\x00-\x7f]*", name="ascii")  # about one in five completions of the untrained model


class Shuffled(Reward):
    """Gives the same scores to the wrong completions, so nothing can be learned from them."""

    name = "shuffled"

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __call__(self, rollouts):
        scores = ASCII(rollouts)
        self.random.shuffle(scores)
        return scores


@cache
def trained_pass_rate(
    reward: Reward,
    lr: float,
    objective: PolicyObjective | None = None,
    advantage: Advantage | None = None,
    beta: float = 0.0,
) -> tuple[float, float]:
    """Return pass@1 of plain ASCII on held-out prompts, before and after 20 phases of 8 prompts x 8 completions."""
    seed_everything(0)
    module = GRPOModule(
        "tiny-small",
        reward,
        objective=objective,
        advantage=advantage,
        beta=beta,
        validation=Validation(ASCII, generations=8),
        sampling=Sampling(max_completion_length=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
    )
    data = VerifiableDataModule(module.tokenizer, Addition(200), val=Addition(20, held_out=True), prompts_per_phase=8)
    trainer = Trainer(max_epochs=20, limit_val_batches=1, check_val_every_n_epoch=20, gradient_clip_val=1.0, **QUIET)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    return before["val/pass@1"], float(trainer.callback_metrics["val/pass@1"])


@pytest.mark.parametrize("advantage", [Centered(), LeaveOneOut(), MaxRL()], ids=lambda each: type(each).__name__)
def test_grpo_learns_what_is_rewarded(advantage):
    before, after = trained_pass_rate(ASCII, 6e-3, advantage=advantage)
    assert before < 0.35
    assert after > 0.8


OBJECTIVES = [
    Clipped(),
    GSPO(),
    GSPOToken(),
    CISPO(),
    REINFORCE(),
    RLOO(),
    REINFORCEPlusPlus(),
    REINFORCEPlusPlus(baseline=True),
    SAPO(),
    DPPO(),
    MirrorDescent(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_every_objective_learns_what_is_rewarded(objective):
    # Without moments each phase begins with a step of the learning rate in every weight, most of it noise.
    before, after = trained_pass_rate(ASCII, 2e-2 if objective.resets_optimizer else 6e-3, objective)
    assert before < 0.35
    assert after > 0.8


@pytest.mark.parametrize(("reward", "lr"), [(Shuffled(), 6e-3), (ASCII, 0.0)], ids=["shuffled", "lr0"])
def test_controls_do_not_learn(reward, lr):
    before, after = trained_pass_rate(reward, lr)
    assert after < before + 0.2


def test_a_strong_kl_keeps_the_policy_at_its_start():
    (_, free), (_, held) = (trained_pass_rate(ASCII, 6e-3, OBJECTIVES[0], **kl) for kl in ({}, {"beta": 10.0}))
    assert held < free - 0.3


def test_sft_learns_the_answers_and_not_the_prompts():
    seed_everything(0)
    module = SFTModule("tiny", optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    data = InstructionDataModule(
        module.tokenizer, Addition(80, digits=1), val=Addition(10, digits=1, held_out=True), batch_size=40
    )
    trainer = Trainer(max_steps=60, **QUIET)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert before["val/loss"] == pytest.approx(
        torch.tensor(261.0).log().item(), abs=0.5
    )  # an untrained model is near uniform
    assert after["val/loss"] < 1.2
    prompt = module.tokenizer("2+3=", return_tensors="pt")["input_ids"]
    asked = module.policy.token_scores(prompt, torch.ones_like(prompt, dtype=torch.bool)).logprobs
    assert -asked[0, 1:].mean().item() > 2.0  # the prompt's own tokens were never a target

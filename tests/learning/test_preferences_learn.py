"""DPO raises what is preferred; reversed labels lower it, and shuffled labels do neither."""

import random

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import PreferenceDataModule
from datamodules.sources import Row, Source
from modules import DPOModule
from modules.losses import IPO, KTO, ORPO, Hinge, LengthNormalized, Robust, Sigmoid, SimPO
from modules.rollout.engine import InProcessEngine
from modules.rollout.sampling import Sampling

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Letters(Source):
    """Pairs of answers of equal length; the one in small letters is preferred to the one in capitals."""

    def __init__(self, labels: str) -> None:
        self.labels = labels

    def rows(self):
        draw = random.Random(0)
        rows = []
        for number in range(96):
            small = "".join(draw.choices("abcdefgh", k=3))
            big = "".join(draw.choices("ABCDEFGH", k=3))
            swap = {"right": False, "swapped": True, "shuffled": draw.random() < 0.5}[self.labels]
            chosen, rejected = (big, small) if swap else (small, big)
            rows.append(
                Row(
                    {"prompt": f"{number:02d}:", "chosen": chosen, "rejected": rejected}, f"letters#{number}", "letters"
                )
            )
        return rows


def shares(labels: str, objective, lr: float = 1e-3) -> tuple[float, float]:
    """Return the shares of small and of capital letters among the first tokens of 256 samples, after training."""
    seed_everything(0)
    module = DPOModule(
        "tiny",
        objective=objective,
        cache_dir=None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
    )
    Trainer(max_epochs=5, gradient_clip_val=1.0, **QUIET).fit(
        module, PreferenceDataModule(module.tokenizer, Letters(labels), batch_size=16, chat=False)
    )
    engine = InProcessEngine()
    engine.sync_weights(module.policy.eval(), 0)
    prompts = [module.tokenizer(f"{number:02d}:").input_ids for number in range(32)]
    found = engine.generate(prompts, 8, Sampling(max_completion_length=1), [100 * number for number in range(32)])
    first = [completion.text for group in found for completion in group]
    return tuple(
        sum(text in letters and text != "" for text in first) / len(first) for letters in ("abcdefgh", "ABCDEFGH")
    )


@pytest.mark.parametrize(
    "objective",
    [Sigmoid(), Robust(), IPO(), Hinge(), LengthNormalized(), SimPO(), ORPO(), KTO()],
    ids=lambda objective: type(objective).__name__,
)
def test_what_is_preferred_becomes_likely(objective):
    small, big = shares("right", objective)
    assert small > 0.05 and small > 2 * big  # untrained: 8 of 261 tokens each, 0.03


def test_swapped_labels_invert_it():
    small, big = shares("swapped", Sigmoid())
    assert big > 0.1 and big > 3 * small


@pytest.mark.parametrize(("labels", "lr"), [("shuffled", 1e-3), ("right", 0.0)])
def test_controls_do_not_learn(labels, lr):
    small, big = shares(labels, Sigmoid(), lr)
    assert abs(small - big) < 0.15

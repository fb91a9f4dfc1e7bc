"""A reward model finds the rule behind its pairs, mistakes length for quality if the pairs do, and finds nothing in
shuffled labels.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules.preference import PreferenceDataModule
from modules.reward import RewardModule
from modules.types import ScoredPair

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
LETTERS = "abcdefghij"
STEPS = 40


def word(rng: random.Random, length: int, digit: bool) -> str:
    """Make a word of letters, one of which is a digit if asked."""
    letters = [rng.choice(LETTERS) for _ in range(length)]
    if digit:
        letters[rng.randrange(length)] = rng.choice("0123456789")
    return "".join(letters)


def pairs(folder: Path, name: str, count: int, seed: int, digit_chosen: float = 1.0, longer_chosen: float = 0.5) -> str:
    """Make pairs in which one answer holds a digit. That answer, and the longer answer, is chosen with the given
    chances.
    """
    rng, rows = random.Random(seed), []
    for _ in range(count):
        short = rng.randint(3, 6)
        lengths = [short, short + rng.randint(2, 4)]
        if rng.random() < longer_chosen:
            lengths.reverse()
        digit = rng.random() < digit_chosen
        chosen, rejected = word(rng, lengths[0], digit), word(rng, lengths[1], not digit)
        rows.append(json.dumps({"prompt": word(rng, 3, False) + ":", "chosen": chosen, "rejected": rejected}))
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return str(file)


def trained(train: str, val: str) -> tuple[float, list[ScoredPair]]:
    """Return the held-out accuracy and the scored held-out pairs of a trained reward model."""
    seed_everything(0)
    module = RewardModule("tiny", optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    data = PreferenceDataModule(module.tokenizer, train, val, batch_size=16, chat=False)
    trainer = Trainer(max_steps=STEPS, max_epochs=-1, limit_val_batches=0, gradient_clip_val=1.0, **QUIET)
    trainer.fit(module, data)
    with torch.no_grad():
        scored = [pair for batch in data.in_order("val") for pair in module.score_pairs(batch)]
    return accuracy(scored), scored


def accuracy(scored: list[ScoredPair]) -> float:
    return sum(pair.chosen_score > pair.rejected_score for pair in scored) / len(scored)


def chosen_shorter(scored: list[ScoredPair]) -> float:
    """Return the accuracy on pairs whose chosen answer is the shorter one."""
    return accuracy([pair for pair in scored if pair.chosen_length < pair.rejected_length])


def test_the_planted_rule_is_found_and_shuffled_labels_hide_it(tmp_path):
    val = pairs(tmp_path, "val", 200, seed=1)
    assert trained(pairs(tmp_path, "train", 600, seed=2), val)[0] > 0.9
    assert trained(pairs(tmp_path, "shuffled", 600, seed=2, digit_chosen=0.5), val)[0] == pytest.approx(0.5, abs=0.2)


def test_length_is_learned_where_it_goes_with_the_choice(tmp_path):
    # labels are noisy, as people's are: length tells more than quality where it is out of balance
    val = pairs(tmp_path, "val", 200, seed=1)
    confounded = trained(pairs(tmp_path, "confounded", 600, seed=2, digit_chosen=0.8, longer_chosen=0.97), val)[1]
    balanced = trained(pairs(tmp_path, "balanced", 600, seed=2, digit_chosen=0.8), val)[1]
    assert chosen_shorter(confounded) < 0.3
    assert chosen_shorter(balanced) > 0.8

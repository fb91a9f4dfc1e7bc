"""Two real ranks log the same as one rank with all rollouts, also when one of them has nothing to count."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from programs import run_ranks

from callbacks import Diversity, EngineMismatch, LengthBias, Overoptimization
from modules.types import Reward, Rollout

MEASURES = {
    "overoptimization": ["proxy", "gold", "gap", "sqrt_kl"],
    "diversity": ["entropy", "distinct_1", "distinct_2", "distinct_answers", "frac_reward_zero_std"],
    "engine_mismatch": [
        *("kl", "fresh_kl", "perplexity_ratio", "log_weight_mean", "log_weight_max", "truncated"),
        *("quarter_1_kl", "quarter_2_log_weight", "quarter_3_truncated", "quarter_4_kl"),
    ],
    "length_bias": ["correlation", "right_length", "wrong_length", "truncated"],
}

SCRIPT = """
import sys
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import ones
from torch.utils.data import DataLoader
from callbacks import Diversity, EngineMismatch, LengthBias, Overoptimization, Samples
from conftest import Scripted, make_rollout
from test_phase_ranks import LengthIsGold, rank_phases

class Ranked(Scripted):
    def on_fit_start(self):
        self.phases = rank_phases(make_rollout)[self.global_rank]

if __name__ == "__main__":
    callbacks = [Overoptimization(LengthIsGold()), Diversity(), EngineMismatch(), LengthBias(), Samples()]
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, callbacks=callbacks, enable_checkpointing=False,
                      logger=TensorBoardLogger(sys.argv[1], name="two", version=""), enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Ranked([]), DataLoader([ones(1)] * 4))
"""


class LengthIsGold(Reward):
    """A reward: the number of tokens of the completion; None for an empty one."""

    name = "gold"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [len(rollout.completion.token_ids) or None for rollout in rollouts]


def rank_phases(make: Callable[..., Rollout]) -> list[list[list[Rollout]]]:
    """Make rollouts by [rank][phase].

    Phase 0: rank 1 has no wrong answer and no KL. Phase 1: rank 1 has nothing. Phase 2: the ranks have unequal numbers.
    """
    wrong = make(0.0, [7] * 5, "b", 0, "length", entropy=2.0, kl=3.0)
    right = make(1.0, [7] * 2, "a", 0, entropy=1.0, kl=1.0)
    other = [make(1.0, [7] * 9, text, 1, entropy=0.5) for text in "aab"]
    mine = [[[wrong, right], [right, right], [wrong]], [other, [], [*other, make(None, [], group=1)]]]
    return [
        [[rescore(rollout, rank + 2 * phase) for rollout in each] for phase, each in enumerate(phases)]
        for rank, phases in enumerate(mine)
    ]


def rescore(rollout: Rollout, number: int) -> Rollout:
    """Add what a trainer computes: log w of 0.1 x ``number`` up to 0.9 more at later tokens, with weights that are 0 or 1 newer."""
    scores = [-1 + 0.1 * (number + place) for place in range(len(rollout.completion.token_ids))]
    return replace(rollout, trainer_logprobs=scores, trainer_version=number % 3 // 2)


def test_two_ranks_equal_one(make: Any, fit: Any, tmp_path: Path) -> None:
    (tmp_path / "two_ranks.py").write_text(SCRIPT)
    run_ranks("two_ranks.py", ".", folder=tmp_path, path=[Path(__file__).parent])

    first, second = rank_phases(make)
    phases = [a + b for a, b in zip(first, second, strict=True)]
    events = type(fit(Diversity(), [[]]))(tmp_path / "two")
    for callback in (Overoptimization(LengthIsGold()), Diversity(), EngineMismatch(), LengthBias()):
        expected = fit(callback, phases)
        for measure in MEASURES[callback.name]:
            name = f"train/{callback.name}/{measure}"
            assert events.scalars(name) == pytest.approx(expected.scalars(name), abs=1e-6), name
            assert len(expected.scalars(name)) >= 2
    assert len(events.images("train/diversity")) == 1
    assert len(events.texts("train/samples")) == 1
    mean_of_rank_means = (0.5 + 1.0) / 2
    assert (
        events.scalars("train/overoptimization/proxy")[0]
        == pytest.approx((0 + 1 + 1 + 1 + 1) / 5, abs=1e-6)
        != mean_of_rank_means
    )

"""A reward for each task: who scores what, what is refused, and a run on two tasks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from datamodules import VerifiableDataModule
from datamodules.sources.mix_in import MixIn
from datamodules.sources.toys.addition import Addition
from datamodules.sources.toys.products import Products
from modules import GRPOModule
from modules.rewards import Dispatch, ExactMatch, LengthPenalty, RegexFormat, WeightedSum
from modules.rewards.combined import describe_reward, find_accuracy
from modules.rollout.metrics import make_outcomes
from modules.rollout.sampling import Sampling
from modules.types import Completion, Reward, Rollout


def rollout(text: str, source: str, answer: str | None = "5", **info: str) -> Rollout:
    return Rollout("u", "p", [1], answer, Completion([7], [0.0], text, "stop"), 0, {}, None, info, source=source)


def test_each_task_has_its_own_reward():
    reward = Dispatch({"sums": ExactMatch(), "chat": RegexFormat(".*please.*"), "games": None})
    found = [rollout("5", "sums"), rollout("5", "chat"), rollout("please", "chat"), rollout("5", "games")]
    assert reward(found) == [1.0, 0.0, 1.0, None]
    assert reward.score_parts(found)[:2] == [
        {"sums": 1.0, "chat": None, "games": None},
        {"sums": None, "chat": 0.0, "games": None},
    ]
    by_column = Dispatch({"a": ExactMatch(), "b": RegexFormat(".*")}, column="task")
    assert by_column([rollout("6", "x", task="a"), rollout("6", "x", task="b")]) == [0.0, 1.0]


def test_a_task_without_a_reward_is_refused():
    with pytest.raises(ValueError, match="u: this prompt is of the data set 'games', for which Dispatch has no reward"):
        Dispatch({"sums": ExactMatch()})([rollout("5", "games")])
    with pytest.raises(ValueError, match="has in its column task 'None'"):
        Dispatch({"sums": ExactMatch()}, column="task")([rollout("5", "games")])
    with pytest.raises(ValueError, match="at least one task"):
        Dispatch({"sums": None})


def test_a_data_set_is_known_by_its_file_with_or_without_its_folder():
    found = [rollout("5", "data/gsm8k")]
    assert Dispatch({"gsm8k": ExactMatch()})(found) == Dispatch({"data/gsm8k": ExactMatch()})(found) == [1.0]
    with pytest.raises(ValueError, match="of the data set 'data/gsm8k'"):
        Dispatch({"other/gsm8k": ExactMatch()})(found)
    assert Dispatch({1: ExactMatch()}, column="level")([rollout("5", "x", level=1)]) == [1.0]


def test_parts_inside_another_reward_have_the_names_of_tasks():
    reward = LengthPenalty(Dispatch({"sums": ExactMatch(), "chat": RegexFormat(".*")}), 0.5)
    assert reward.name_parts() == ["sums", "chat", "dispatch_length_penalty"]
    assert list(reward.score_parts([rollout("5", "sums")])[0]) == reward.name_parts()
    outcomes = make_outcomes(
        make_scored(reward), find_accuracy(LengthPenalty(Dispatch({"sums": ExactMatch()}), 0.5)), reward
    )
    assert [outcome.right for outcome in outcomes] == [True]


def make_scored(reward: Reward) -> list[Rollout]:
    (parts,) = reward.score_parts([rollout("5", "sums")])
    return [replace(rollout("5", "sums"), rewards=parts, reward=reward.add_parts(parts))]


class Doubled(Reward):
    """A reward of one's own with parts."""

    def __init__(self, *rewards: Reward) -> None:
        self.rewards = list(rewards)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        return [self.add_parts(parts) for parts in self.score_parts(rollouts)]

    def score_parts(self, rollouts: Sequence[Rollout]) -> list[dict[str, float | None]]:
        columns = [reward(rollouts) for reward in self.rewards]
        return [dict(zip(self.name_parts(), row, strict=True)) for row in zip(*columns, strict=True)]

    def add_parts(self, parts: dict[str, float | None]) -> float | None:
        return 2 * sum(value or 0.0 for value in parts.values())

    def list_parts(self) -> list[Reward]:
        return self.rewards


def test_a_reward_says_itself_what_its_parts_are():
    """So its verifier tells right from wrong by the scores that are there, and is not asked again."""
    exact, even = ExactMatch(), RegexFormat(r"\d*[02468]", name="even")
    reward = LengthPenalty(Doubled(exact, even), 0.5)
    assert reward.name_parts() == ["exact_match", "even", "Doubled_length_penalty"]
    assert find_accuracy(reward) is exact
    scored = [replace(each, rewards=each.rewards | {"exact_match": 0.0}) for each in make_scored(reward)]
    assert [outcome.right for outcome in make_outcomes(scored, exact, reward)] == [False]
    assert [outcome.right for outcome in make_outcomes(scored, exact, even)] == [True]


def test_a_verifier_of_one_task_does_not_judge_the_others():
    assert find_accuracy(Dispatch({"sums": ExactMatch(), "chat": RegexFormat(".*")})) is None
    assert (
        find_accuracy(WeightedSum([Dispatch({"sums": ExactMatch(), "chat": RegexFormat(".*")}), RegexFormat("a")]))
        is None
    )
    both = Dispatch({"sums": ExactMatch(), "products": ExactMatch()})
    assert find_accuracy(both) is both


def fit(folder: Path, reward: Dispatch) -> Trainer:
    data = VerifiableDataModule(
        train=MixIn(Addition(6), Products(6), num=6), val=Products(4, held_out=True), prompts_per_phase=12
    )
    module = GRPOModule("tiny-addition", reward, num_generations=2, sampling=Sampling(max_completion_length=4))
    trainer = Trainer(default_root_dir=folder, max_epochs=1, accelerator="cpu", devices=1, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    return trainer


def test_a_run_on_two_tasks(tmp_path):
    trainer = fit(tmp_path, Dispatch({"addition": ExactMatch(), "products": RegexFormat(r"\d+")}))
    found = trainer.callback_metrics
    assert 0 <= found["train/rewards/addition/mean"] <= 1
    assert found["train/rewards/products/mean"] > 0.9  # tiny-addition answers with digits
    assert found["train/reward"] == pytest.approx(
        (found["train/rewards/addition/mean"] + found["train/rewards/products/mean"]) / 2
    )


def test_a_run_with_an_unknown_task_ends_before_its_first_step(tmp_path):
    with pytest.raises(ValueError, match="products-training#.* is of the data set 'products'"):
        fit(tmp_path, Dispatch({"addition": ExactMatch()}))


def test_rewards_are_told_apart_by_their_settings():
    assert describe_reward(RegexFormat("a")) != describe_reward(RegexFormat("b"))
    assert describe_reward(RegexFormat("a")) == describe_reward(RegexFormat("a"))

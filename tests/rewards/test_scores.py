"""What a reward may return: one check, with the reward's name, wherever a reward is called."""

import copy
import time
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy
import pytest
import torch

from callbacks.overoptimization import Overoptimization
from modules import types
from modules.generation import Validation
from modules.rewards import ExactMatch, LearnedReward, LengthPenalty, NumericMatch, RegexFormat, Versus, WeightedSum
from modules.rewards.combined import find_accuracy
from modules.rollout.metrics import make_outcomes
from modules.types import Completion, FunctionReward, Reward, Rollout, score


class Returns(Reward):
    """A reward that returns one thing, whatever it is."""

    name = "mine"

    def __init__(self, found: Any) -> None:
        self.found, self.calls = found, 0

    def __call__(self, rollouts):
        self.calls += len(rollouts)
        return self.found


def rollouts(count: int = 2) -> list[Rollout]:
    return [Rollout("u", "p", [1], "4", Completion([2], [0.0], "4", "stop"), 0, {}, None) for _ in range(count)]


WRONG = [
    (None, "returned None .is its return missing"),
    ({0: 1.0, 1: 0.5}, "returned dict"),
    ("ab", "returned str"),
    (["yes", "no"], "returned 'yes' for rollout 0"),
    ([0.5, [1.0]], r"returned \[1.0\] for rollout 1"),
    ([1.0], "returned 1 scores for 2"),
    ([1.0, float("inf")], "returned inf for rollout 1"),
    ([1.0, 1e39], r"returned 1e\+39 for rollout 1"),
    ([1.0, 10**400], "returned 10000"),
    ([1.0, torch.tensor([1.0, 2.0])], "returned tensor"),
    ([1.0, numpy.array([1.0, 2.0])], "returned array"),
    ([1.0, Decimal("sNaN")], "returned Decimal"),
    (torch.tensor(1.0), "returned float"),
]


@pytest.mark.parametrize(("found", "said"), WRONG)
def test_a_wrong_return_is_refused_by_name_at_every_door(found: Any, said: str) -> None:
    reward, rows = Returns(found), rollouts()

    def mine(completions):
        return found

    doors = [
        lambda: score(reward, rows),
        lambda: reward.score_parts(rows),
        lambda: WeightedSum([reward])(rows),
        lambda: LengthPenalty(reward, 0.1)(rows),
        lambda: make_outcomes(rows, reward),  # the accuracy of a validation
        lambda: Overoptimization(reward).measure(rows),  # the gold reward
        lambda: FunctionReward(mine)(rows),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=f"reward 'mine' {said}"):
            door()
    with pytest.raises(ValueError, match="reward 'mine'"):
        Versus(reward)(rows)


@pytest.mark.parametrize("found", [[1, None], (True, None), torch.tensor([1.0, 0.0]), [torch.tensor(1.0), None]])
def test_numbers_of_any_kind_are_taken(found: Any) -> None:
    assert score(Returns(found), rollouts())[0] == 1.0


def test_no_rollouts_are_not_scored() -> None:
    assert score(Returns("wrong"), []) == [] and Returns("wrong").score_parts([]) == []


def test_the_reward_that_tells_right_from_wrong() -> None:
    exact, form = ExactMatch(), RegexFormat(".")
    assert find_accuracy(exact) is exact and find_accuracy(form) is form
    assert find_accuracy(WeightedSum([form, exact], [0.2, 1.0])) is exact
    assert find_accuracy(LengthPenalty(WeightedSum([exact, form]), 0.1)) is exact
    for unclear in (WeightedSum([form]), LengthPenalty(form, 0.1), WeightedSum([exact, NumericMatch()]), Versus(form)):
        assert find_accuracy(unclear) is None
    assert LearnedReward.checks_answer is False and Validation().accuracy is None


def test_a_penalty_on_length_keeps_the_parts() -> None:
    (parts,) = LengthPenalty(WeightedSum([ExactMatch(), RegexFormat("a", name="form")]), 0.25).score_parts(rollouts(1))
    assert parts == {"exact_match": 1.0, "form": 0.0, "weighted_sum_length_penalty": -0.25}


def test_a_part_is_not_scored_again_to_tell_right_from_wrong() -> None:
    inner = Returns([0.0, 1.0])
    reward = LengthPenalty(WeightedSum([inner, RegexFormat("4")], [0.1, 1.0]), 0.0)
    scored = [
        Rollout(**{**vars(row), "rewards": part})
        for row, part in zip(rollouts(), reward.score_parts(rollouts()), strict=True)
    ]
    assert [outcome.right for outcome in make_outcomes(scored, inner, scored_by=reward)] == [False, True]
    assert inner.calls == 2


def test_a_reward_that_hangs_or_raises_is_named(monkeypatch, recwarn):
    monkeypatch.setattr(types, "SLOW", 0.2)

    def mine(completions, **columns):
        while len(recwarn.list) < 3:
            time.sleep(0.05)
        raise KeyError("x")

    with pytest.raises(ValueError, match=r"^reward 'mine' failed at test_scores.py:\d+: KeyError: 'x'$") as raised:
        score(FunctionReward(mine), rollouts())
    assert isinstance(raised.value.__cause__, KeyError)
    for warned, seconds in zip(recwarn.list, ("0.2", "0.4", "0.8"), strict=True):
        assert str(warned.message).startswith(f"reward 'mine' has been scoring 2 completions for {seconds} s")
        assert warned.filename == types.__file__  # and so one line of ours, see test_command_line


def test_a_function_may_change_what_it_is_given():
    def mine(completion_ids, tests):
        for ids, own in zip(completion_ids, tests, strict=True):
            ids.clear()
            own.pop()
        return [1.0] * len(tests)

    given = [replace(rollout, info={"tests": [[1], [2]]}) for rollout in rollouts()]
    kept = copy.deepcopy(given)
    assert score(FunctionReward(mine), given) == [1.0] * len(given)
    assert given == kept


def test_a_quick_reward_is_not_named(monkeypatch, recwarn):
    monkeypatch.setattr(types, "SLOW", 0.2)
    assert score(Returns([1, None]), rollouts()) == [1.0, None]
    time.sleep(0.4)
    assert not recwarn.list


class Ruled(Reward):
    """A reward that keeps a function of its own."""

    name = "ruled"

    def __init__(self) -> None:
        self.rule = lambda text: float(text == "4")

    def __call__(self, rollouts):
        return [self.rule(rollout.completion.text) for rollout in rollouts]


def test_a_function_that_a_reward_keeps_is_no_reward_of_its_own():
    reward = Ruled()
    assert find_accuracy(reward) is reward

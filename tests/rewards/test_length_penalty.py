"""A reward minus the price of its tokens."""

import pytest

from modules.rewards.answers import ExactMatch
from modules.rewards.combined import LengthPenalty
from modules.rewards.format import RegexFormat
from modules.types import Completion, Rollout


def rollout(text: str, tokens: int, answer: str | None = None) -> Rollout:
    return Rollout("u", "p", [1], answer, Completion([7] * tokens, [0.0] * tokens, text, "stop"), 0, {}, None)


def test_each_token_costs():
    reward = LengthPenalty(RegexFormat("a+", name="letters"), per_token=0.25)
    scores = reward([rollout("aaa", 4), rollout("b", 2), rollout("", 0)])
    assert scores == [0.0, -0.5, 0.0]  # 1 - 0.25 x 4, 0 - 0.25 x 2, 0 - 0: tokens, not characters
    assert reward.name == "letters_length_penalty"


def test_unscorable_stays_so():
    assert LengthPenalty(ExactMatch(), 0.1)([rollout("a", 3), rollout("a", 3, "a")]) == [None, pytest.approx(0.7)]


def test_text_without_tokens_has_no_length():
    with pytest.raises(ValueError, match="u: LengthPenalty counts tokens"):
        LengthPenalty(ExactMatch(), 0.1)([rollout("a", 0)])


@pytest.mark.parametrize("per_token", [-0.1, float("nan"), float("inf")])
def test_cost_is_checked(per_token):
    with pytest.raises(ValueError, match="per_token must be a finite number >= 0"):
        LengthPenalty(ExactMatch(), per_token)

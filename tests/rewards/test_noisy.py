"""A reward with errors: their rates, and that they belong to the completion."""

import pytest

from modules.rewards import ExactMatch, Noisy, TokenF1
from modules.rewards.combined import find_accuracy
from modules.types import Completion, Rollout


def rollout(number: int, text: str, answer: str | None = "yes") -> Rollout:
    return Rollout(f"u{number % 50}", "p", [1], answer, Completion([number], [0.0], text, "stop"), 0, {}, None)


RIGHT = [rollout(number, "yes") for number in range(2000)]
WRONG = [rollout(number, "no") for number in range(2000)]


def test_rates_of_errors():
    scores = Noisy(ExactMatch(), false_positive=0.1, false_negative=0.3, seed=1)([*RIGHT, *WRONG])
    # 600 +- 4 sqrt(2000 * 0.3 * 0.7) = 82, and 200 +- 4 sqrt(2000 * 0.1 * 0.9) = 54
    assert abs(scores[:2000].count(0.0) - 600) < 82 and abs(scores[2000:].count(1.0) - 200) < 54
    assert Noisy(ExactMatch(), seed=1)([*RIGHT, *WRONG]) == [1.0] * 2000 + [0.0] * 2000
    assert Noisy(ExactMatch(), 1.0, 1.0)([RIGHT[0], WRONG[0], rollout(1, "yes", None)]) == [0.0, 1.0, None]


def test_an_error_belongs_to_the_completion():
    noisy = Noisy(ExactMatch(), 0.5, 0.5, seed=1)
    assert (
        noisy(RIGHT)[::-1]
        == noisy(RIGHT[::-1])
        == [score for half in (RIGHT[1000:], RIGHT[:1000]) for score in noisy(half[::-1])]
    )
    assert noisy(RIGHT) != Noisy(ExactMatch(), 0.5, 0.5, seed=2)(RIGHT)


def test_validation_asks_the_reward_inside():
    inside = ExactMatch()
    assert find_accuracy(Noisy(inside, 0.1)) is inside


def test_only_rights_and_wrongs_are_turned():
    with pytest.raises(ValueError, match="Noisy turns 0 into 1 and 1 into 0, but 'token_f1' gave 0.66"):
        Noisy(TokenF1(), 0.1)([rollout(1, "yes yes")])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5 and 0"):
        Noisy(ExactMatch(), 1.5)

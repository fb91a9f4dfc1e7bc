"""Rewards on length against numbers that were worked out by hand."""

import math

import pytest

from modules.rewards import (
    CosineLength,
    ExactMatch,
    KimiLength,
    LengthPenalty,
    MathVerify,
    OverlongPenalty,
    WeightedSum,
)
from modules.rewards.combined import find_accuracy
from modules.types import Completion, Rollout


def rollout(tokens: int, right: bool | None = True, group: int = 0) -> Rollout:
    completion = Completion([7] * tokens, [0.0] * tokens, "yes" if right else "no", "stop")
    return Rollout(f"u{group}", "p", [1], None if right is None else "yes", completion, group, {}, None)


def test_kimi_by_hand():
    lengths, right = [100, 200, 300], [True, False, True]
    assert KimiLength(ExactMatch())([rollout(*pair) for pair in zip(lengths, right, strict=True)]) == [0.5, 0.0, -0.5]
    # the shortest is wrong: min(0, 0.5); the longest is wrong: min(0, -0.5); 0.5 - (200 - 100) / 200 = 0 between them
    assert KimiLength(ExactMatch())([rollout(100, False), rollout(300, False), rollout(200)]) == [0.0, -0.5, 0.0]
    assert KimiLength(ExactMatch())([rollout(9), rollout(9), rollout(9, False)]) == [0.0, 0.0, 0.0]


def test_kimi_compares_completions_of_one_prompt_only():
    mixed = [rollout(100, group=0), rollout(500, group=1), rollout(200, group=0), rollout(900, group=1)]
    assert KimiLength(ExactMatch())(mixed) == [0.5, 0.5, -0.5, -0.5]
    assert KimiLength(ExactMatch())([rollout(100)]) == [0.0]
    # the length of a completion without a score counts: 0.5 - (200 - 100) / 300
    unscored = KimiLength(ExactMatch())([rollout(100), rollout(200), rollout(400, None)])
    assert unscored == [0.5, pytest.approx(1 / 6), None]


def test_the_part_of_a_sum_says_what_is_right():
    right = MathVerify()
    assert find_accuracy(WeightedSum([right, KimiLength(MathVerify())])) is right
    assert isinstance(find_accuracy(CosineLength(ExactMatch(), 10)), ExactMatch)


def test_overlong_by_hand():
    reward = OverlongPenalty(max_length=20480, cache=4096)
    scores = reward([rollout(length) for length in (1, 16384, 17000, 18432, 20480, 21000)])
    assert scores == pytest.approx([0.0, 0.0, -616 / 4096, -0.5, -1.0, -1.0])


def test_cosine_by_hand():
    reward = CosineLength(ExactMatch(), max_length=100)
    # cos(pi / 3) = 1/2 at a third of the way: three quarters of the start and a quarter of the end
    third = CosineLength(ExactMatch(), max_length=300)
    assert third([rollout(100), rollout(100, False)]) == pytest.approx([0.75 * 2 + 0.25 * 1, 0.75 * -10 + 0.25 * 0])
    assert reward([rollout(50), rollout(50, False)]) == pytest.approx([1.5, -5.0])
    assert reward([rollout(100), rollout(101, False), rollout(50, None)]) == [-10.0, -10.0, None]
    short, long = reward([rollout(1), rollout(99)])
    assert short > long > 1.0 and math.isclose(long, 1.0, abs_tol=1e-3)


@pytest.mark.parametrize("reward", [KimiLength(ExactMatch()), OverlongPenalty(9, 4), CosineLength(ExactMatch(), 9)])
def test_text_without_tokens_is_refused(reward):
    with pytest.raises(ValueError, match=f"u0: {type(reward).__name__} counts tokens, and this completion is text"):
        reward([rollout(0)])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="cache must be from 1 to max_length, which includes it, got 10 of 9"):
        OverlongPenalty(9, 10)
    with pytest.raises(ValueError, match="CosineLength needs a max_length of at least 1 and finite values"):
        CosineLength(ExactMatch(), 0)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (KimiLength(ExactMatch()), [0.5, -0.5]),  # 3 and 4 tokens; with the results 8 and 4
        (OverlongPenalty(4, 2), [-0.5, -1.0]),  # (2 - 3) / 2, (2 - 4) / 2
        (LengthPenalty(ExactMatch(), 0.1), [pytest.approx(0.7), pytest.approx(0.6)]),
        (CosineLength(ExactMatch(), 6, right=(1.0, 0.0)), [pytest.approx(0.5), pytest.approx(0.25)]),  # at 1/2 and 2/3
    ],
    ids=lambda each: type(each).__name__,
)
def test_results_of_tools_are_no_length_of_the_policy(reward, expected):
    called = Completion([7] * 8, [0.0] * 8, "yes", "stop", sampled=[True, *[False] * 5, True, True])
    both = [Rollout("u0", "p", [1], "yes", called, 0, {}, None), rollout(4)]
    assert reward(both) == expected

"""Advantages by class: numbers by hand, naive loops, completions without a score, what a reward must be."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.losses import GDPO, Advantage, Centered, LeaveOneOut, MaxRL, Whitened, ZScore
from modules.losses.advantage import as_advantage
from modules.rewards import ExactMatch, RegexFormat, WeightedSum

THIRD = 1 / 3


def phase(rewards: list[float], group: list[int], lengths: list[int] | None = None, **more: Tensor) -> Any:
    lengths = lengths or [2] * len(rewards)
    return {
        "rewards": torch.tensor(rewards, dtype=torch.float32),
        "group": torch.tensor(group),
        "prompt_index": torch.tensor(group),
        "completion_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        **more,
    }


def numbers(found: Tensor) -> list[float]:
    return [pytest.approx(x, abs=1e-5) for x in found.flatten().tolist()]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (ZScore(), [1.49970, -0.49990, -0.49990, -0.49990]),  # .75 / (.5 + 1e-4)
        (ZScore(ddof=0, eps=0.0), [1.73205, -0.57735, -0.57735, -0.57735]),  # .75 / .433013
        (Centered(), [0.75, -0.25, -0.25, -0.25]),
        (LeaveOneOut(), [1, -THIRD, -THIRD, -THIRD]),
        (MaxRL(), [3, -1, -1, -1]),  # .75 / .25
    ],
)
def test_hand_numbers(advantage: Advantage, expected: list[float]) -> None:
    assert numbers(advantage(phase([1, 0, 0, 0], [5] * 4))) == expected
    # An unscorable completion enters no mean, and a group of equal rewards teaches nothing.
    with_nan = advantage(phase([1, 0, 0, 0, math.nan, 0, 0], [5] * 5 + [2] * 2))
    assert numbers(with_nan) == [*expected, 0, 0, 0]
    assert numbers(advantage(phase([1, 1, 1], [0] * 3))) == [0, 0, 0]


def test_centred_is_leave_one_out_up_to_a_factor() -> None:
    batch = phase([0.3, 0.9, 0.1, 0.5, 0.2, 0.8], [0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(LeaveOneOut()(batch), Centered()(batch) * 3 / 2)


def test_maxrl_refuses_rewards_below_0() -> None:
    with pytest.raises(ValueError, match=r"MaxRL divides by the mean reward of a group, and a reward is -0\.5: use"):
        MaxRL()(phase([1, -0.5, math.nan], [0, 0, 0]))


def test_whitened_hand_numbers() -> None:
    """Two groups of equal lengths: centred .75, -.25 x 3, .25 x 3, -.75, whose population std is .433013."""
    batch = phase([1, 0, 0, 0, 1, 1, 1, 0], [0] * 4 + [1] * 4, [1] * 8)
    expected = [1.73205, *[-0.57735] * 3, *[0.57735] * 3, -1.73205]
    assert numbers(Whitened(baseline=True)(batch)) == expected
    # Without a baseline: mean 4 / 8, std .5
    assert numbers(Whitened()(batch)) == [1, -1, -1, -1, 1, 1, 1, -1]


def test_whitening_is_over_tokens_and_takes_the_kl_from_each_token_on() -> None:
    # 1 token of reward 1 and 3 of reward 0: mean 1/4, variance 3/16
    batch = phase([1, 0, math.nan], [0, 1, 2], [1, 3, 2])
    std = math.sqrt(3) / 4
    found = Whitened()(batch)
    assert numbers(found[:2]) == [0.75 / std, 0, 0, -0.25 / std, -0.25 / std, -0.25 / std]
    assert numbers(found[2]) == [0, 0, 0]  # unscorable, in no moment
    penalties = torch.tensor([[0.5, 9, 9], [0.1, 0.2, 0.3], [9, 9, 9]])
    returns = [1 - 0.5, -0.6, -0.5, -0.3]  # minus the KL of this token and of those after it
    mean = sum(returns) / 4
    std = math.sqrt(sum((x - mean) ** 2 for x in returns) / 4)
    found = Whitened()(phase([1, 0, math.nan], [0, 1, 2], [1, 3, 2], penalties=penalties))
    assert numbers(found[:2]) == [(x - mean) / std for x in (returns[0], mean, mean, *returns[1:])]


def test_a_kl_in_the_reward_is_that_of_the_whole_completion() -> None:
    penalties = torch.tensor([[0.1, 0.2, 9.0], [0.0, 0.0, 0.0]])
    batch = phase([1, 0], [0, 0], [2, 3], penalties=penalties)
    assert numbers(LeaveOneOut()(batch)) == [1 - 0.3, -(1 - 0.3)]  # r - sum k1, the reward of 2402.14740
    assert [kind.takes_kl for kind in (LeaveOneOut(), Whitened(), GDPO(), MaxRL())] == [True, True, False, False]


def test_gdpo_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    parts, weights = torch.rand(8, 3, generator=generator), torch.tensor([1.0, 0.5, -2.0])
    parts[3, 1] = math.nan  # one part unscorable makes the completion unscorable
    group = [0, 0, 0, 0, 1, 1, 1, 1]
    rewards = (parts * weights).sum(1)
    found = GDPO(ddof=0, eps=0.0)(phase(rewards.tolist(), group, parts=parts, part_weights=weights))
    totals = torch.zeros(8)
    for c in range(3):
        for rows in ([0, 1, 2], [4, 5, 6, 7]):
            own = parts[rows, c]
            totals[rows] += weights[c] * (own - own.mean()) / own.std(correction=0)
    scored = totals[[0, 1, 2, 4, 5, 6, 7]]
    expected = (totals - scored.mean()) / scored.std(correction=0)
    expected[3] = 0
    assert numbers(found) == expected.tolist()


def test_gdpo_keeps_apart_what_a_sum_maps_to_one_advantage() -> None:
    """Two completions with (0, 1) against (0, 2) by two parts: z-scores of the sums are the same, GDPO's are not."""
    parts = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    batch = phase([1, 0, 2, 0], [0, 0, 1, 1], parts=parts, part_weights=torch.ones(2))
    assert ZScore(eps=0.0)(batch)[0] == ZScore(eps=0.0)(batch)[2]
    assert GDPO()(batch)[2] > 1.5 * GDPO()(batch)[0]


def test_what_is_refused_and_what_a_function_gets() -> None:
    total = WeightedSum([ExactMatch(), RegexFormat("x")])
    GDPO().check(total)
    with pytest.raises(ValueError, match="GDPO normalises the parts of a WeightedSum, and the reward is ExactMatch"):
        GDPO().check(ExactMatch())
    with pytest.raises(ValueError, match="ZScore: ddof must be >= 0 and <= 1, got 2"):
        ZScore(ddof=2)
    own = as_advantage(lambda rewards, group: rewards * 2 + group)
    assert numbers(own(phase([1, 0], [3, 4]))) == [5, 4]
    assert as_advantage(own) is own
    assert numbers(as_advantage(lambda rewards, group: rewards)(phase([1, math.nan], [0, 0]))) == [1, 0]
    for wrong, message in (
        (lambda rewards, group: rewards.mean(), r"<lambda> returned shape \[\], expected a tensor of shape \[2\]"),
        (lambda rewards, group: rewards[:1], r"returned shape \[1\]"),
        (lambda rewards, group: rewards.tolist(), "returned list"),
        (lambda rewards, group: rewards / 0, "returned a number that is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            as_advantage(wrong)(phase([1, 0], [0, 0]))
    assert [kind.least_generations for kind in (ZScore(), Whitened(), Whitened(True))] == [2, 1, 2]

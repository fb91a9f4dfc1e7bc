"""LengthBias in a real Trainer, on rollouts whose answers are known."""

from typing import Any

import pytest
import torch

from callbacks import LengthBias


def test_reward_that_is_length_correlates_fully(make: Any, fit: Any) -> None:
    lengths = [3, 8, 1, 20, 5, 5]
    longer = [make(0.01 * n, [7] * n, group=i // 3) for i, n in enumerate(lengths)]
    shorter = [make(-0.01 * n, [7] * n, group=i // 3) for i, n in enumerate(lengths)]
    constant = [make(0.1, [7] * n, group=i // 3) for i, n in enumerate(lengths)]
    events = fit(LengthBias(), [longer, shorter, constant])
    assert events.scalars("train/length_bias/correlation") == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)


def test_correlation_is_within_prompts(make: Any, fit: Any) -> None:
    # Long answers and high rewards belong to prompt 1; inside each prompt the shorter answer wins.
    rollouts = [
        make(2.0, [7] * 1, group=0),
        make(0.0, [7] * 3, group=0),
        make(12.0, [7] * 11, group=1),
        make(10.0, [7] * 13, group=1),
    ]
    assert fit(LengthBias(), [rollouts]).scalars("train/length_bias/correlation") == pytest.approx([-1.0], abs=1e-6)


def test_random_rewards_correlate_with_nothing(make: Any, fit: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(400, generator=generator).tolist()
    lengths = torch.randint(1, 30, (400,), generator=generator).tolist()
    rollouts = [make(reward, [7] * n, group=i // 8) for i, (reward, n) in enumerate(zip(rewards, lengths, strict=True))]
    (correlation,) = fit(LengthBias(), [rollouts]).scalars("train/length_bias/correlation")
    assert abs(correlation) < 3 / 400**0.5


def test_lengths_of_right_and_wrong(make: Any, fit: Any) -> None:
    rollouts = [
        make(1.0, [7] * 4),
        make(1.0, [7] * 6),
        make(0.5, [7] * 10),
        make(0.0, [7] * 20, finish="length"),
        make(None, [7] * 99),
    ]
    events = fit(LengthBias(), [rollouts])
    assert events.scalars("train/length_bias/right_length") == pytest.approx([5.0], abs=1e-6)
    assert events.scalars("train/length_bias/wrong_length") == pytest.approx([15.0], abs=1e-6)
    assert events.scalars("train/length_bias/truncated") == pytest.approx([1 / 5], abs=1e-6)
    events = fit(LengthBias(right_above=0.4), [rollouts])
    assert events.scalars("train/length_bias/right_length") == pytest.approx([20 / 3], abs=1e-6)


def test_a_phase_without_wrong_answers_has_no_wrong_length(make: Any, fit: Any) -> None:
    events = fit(LengthBias(), [[make(1.0)], [make(0.0)]])
    assert len(events.scalars("train/length_bias/right_length")) == 1
    assert len(events.scalars("train/length_bias/wrong_length")) == 1
    assert fit(LengthBias(), [[]]).names("train/length_bias") == set()

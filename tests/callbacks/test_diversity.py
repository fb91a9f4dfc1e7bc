"""Diversity in a real Trainer, on rollouts whose answers are known."""

import math
from typing import Any

import pytest

from callbacks import Diversity


def test_hand_case(make: Any, fit: Any) -> None:
    rollouts = [
        make(1.0, [1, 2, 1, 2], "a", 0, entropy=1.0),
        make(0.0, [1, 2, 3], "b", 0, entropy=3.0),
        make(1.0, [1, 2], "a", 1, entropy=0.5),
        make(1.0, [1, 2], "a", 1),
    ]
    events = fit(Diversity(), [rollouts])
    assert events.scalars("train/diversity/entropy") == pytest.approx([(4 * 1.0 + 3 * 3.0 + 2 * 0.5) / 9], abs=1e-6)
    assert events.scalars("train/diversity/distinct_1") == pytest.approx([3 / 11], abs=1e-6)
    assert events.scalars("train/diversity/distinct_2") == pytest.approx([3 / 7], abs=1e-6)  # 12 21 12 12 23 12 12
    assert events.scalars("train/diversity/distinct_answers") == pytest.approx([(2 / 2 + 1 / 2) / 2], abs=1e-6)
    assert events.scalars("train/diversity/frac_reward_zero_std") == pytest.approx([1 / 2], abs=1e-6)
    mean_of_sequence_entropies = (1.0 + 3.0 + 0.5) / 3
    assert abs(events.scalars("train/diversity/entropy")[0] - mean_of_sequence_entropies) > 0.01


def test_collapse(make: Any, fit: Any) -> None:
    uniform = [make(float(i % 2), [4 * i, 4 * i + 1], f"answer {i}", i // 4, entropy=math.log(261)) for i in range(8)]
    collapsed = [make(1.0, [7, 8], "same", i // 4, entropy=0.0) for i in range(8)]
    events = fit(Diversity(), [uniform, collapsed])
    assert events.scalars("train/diversity/entropy") == pytest.approx([math.log(261), 0.0], abs=1e-6)
    assert events.scalars("train/diversity/distinct_answers") == pytest.approx([1.0, 1 / 4], abs=1e-6)
    assert events.scalars("train/diversity/distinct_2") == pytest.approx([1.0, 1 / 8], abs=1e-6)
    assert events.scalars("train/diversity/frac_reward_zero_std") == pytest.approx([0.0, 1.0], abs=1e-6)


def test_answers_are_compared_as_texts(make: Any, fit: Any) -> None:
    rollouts = [make(token_ids=[1, 2], text="42"), make(token_ids=[3], text="42"), make(token_ids=[3], text="42 ")]
    assert fit(Diversity(), [rollouts]).scalars("train/diversity/distinct_answers") == pytest.approx([2 / 3], abs=1e-6)
    other = [make(token_ids=[1, 2], text="42"), make(token_ids=[3], text="42")]
    assert fit(Diversity(), [other]).scalars("train/diversity/distinct_answers") == pytest.approx([1 / 2], abs=1e-6)


def test_growth_does_not_lower_distinct_n(make: Any, fit: Any) -> None:
    short = [make(token_ids=[10 * i + t for t in range(4)]) for i in range(3)]
    long = [make(token_ids=[10 * i + t for t in range(4)] * 5) for i in range(3)]
    events = fit(Diversity(prefix_tokens=4), [short, long])
    assert events.scalars("train/diversity/distinct_1") == pytest.approx([1.0, 1.0], abs=1e-6)
    events = fit(Diversity(prefix_tokens=20), [short, long])
    assert events.scalars("train/diversity/distinct_1") == pytest.approx([1.0, 12 / 60], abs=1e-6)


def test_unscorable_rewards_decide_nothing(make: Any, fit: Any) -> None:
    rollouts = [
        make(1.0, group=0),
        make(None, group=0),
        make(0.0, group=1),
        make(1.0, group=1),
        make(None, group=2),
        make(None, group=2),
    ]
    events = fit(Diversity(), [rollouts])
    assert events.scalars("train/diversity/frac_reward_zero_std") == pytest.approx([1 / 2], abs=1e-6)


def test_nothing_to_measure_logs_nothing(make: Any, fit: Any) -> None:
    assert fit(Diversity(), [[]]).names("train/diversity") == set()
    names = fit(Diversity(), [[make(None, [])]]).names("train/diversity")
    assert names == {"train/diversity/distinct_answers"}


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="every_n_phases must be at least 1, got 0"):
        Diversity(every_n_phases=0)
    with pytest.raises(ValueError, match="prefix_tokens"):
        Diversity(prefix_tokens=1)

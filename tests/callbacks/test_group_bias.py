"""GroupBias on completions whose numbers are known, the enumerations behind it, and TokenBudget."""

from dataclasses import replace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from callbacks import GroupBias, TokenBudget
from modules import GRPOModule, SFTModule
from modules.functional.advantages import expected_weight, group_center, group_zscore, leave_one_out, mixed_mean_bias
from modules.rewards import ExactMatch
from modules.types import Credit


def test_numbers_by_hand(fit: Any) -> None:
    # Group 0 of 4 has one right answer, and an unscorable fifth; group 1 of 2 has one; group 2 none, so no gradient.
    credits = [
        Credit(0, 2, 1.0, 3.0, 6.0),
        Credit(0, 4, 0.0, -1.0, 2.0),
        Credit(0, 4, 0.0, -1.0, 2.0),
        Credit(0, 8, 0.0, None, 0.0),  # cut off, and left out for that
        Credit(0, 9, None, None, 0.0),
        Credit(1, 4, 1.0, 1.0, 5.0),
        Credit(1, 6, 0.0, -1.0, 5.0),
        Credit(2, 7, 0.0, 0.0, 0.0),
        Credit(2, 7, 0.5, 0.0, 0.0),
    ]
    events = fit(GroupBias(), [[]] * 3, credits=credits)
    expected = {
        # Those that teach have lengths 2 | 4 4 4 | 6 | 7 7: middle ranks 0.5, 2.5, 4.5 and 6 of 7
        "advantage_decile_1": 3.0,
        "advantage_decile_4": (-1 - 1 + 1) / 3,
        "advantage_decile_7": -1.0,
        "advantage_decile_9": 0.0,
        "gradient_share_hard": 10 / 20,
        "gradient_share_middle": 10 / 20,
        "gradient_share_easy": 0.0,
        "group_share_hard": 1 / 2,
        "group_share_middle": 1 / 2,
        "group_share_easy": 0.0,
        "right_length": 3.0,
        "wrong_length": (4 + 4 + 8 + 6 + 7 + 7) / 6,
        "baseline_bias_hard": (1 / 4 - 1 / 256) / (1 - 1 / 256 - 81 / 256) - 1 / 4,
        "baseline_bias_middle": 0.0,
    }
    tags = {name.removeprefix("train/group_bias/") for name in events.names("train/group_bias")}
    assert tags == set(expected)
    for name, value in expected.items():
        assert events.scalars(f"train/group_bias/{name}") == pytest.approx([value] * 3, abs=1e-6), name
    assert [step for step, *_ in events.images("train/group_bias")] == [6]
    events = fit(GroupBias(right_above=0.4), [[]] * 3, credits=credits)  # then 0.5 is right
    assert events.scalars("train/group_bias/right_length") == pytest.approx([(2 + 4 + 7) / 3] * 3)


def test_a_method_without_groups_is_refused() -> None:
    trainer = Trainer(logger=False, accelerator="cpu")
    with pytest.raises(ValueError, match="GroupBias asks .* which SFTModule does not say: use it with GRPOModule"):
        GroupBias().setup(trainer, SFTModule("tiny"), "fit")
    GroupBias().setup(trainer, GRPOModule("tiny", ExactMatch()), "fit")


def test_the_expected_weight_by_hand() -> None:
    # G = 2: mixed with probability 2 p q, and then |A| sums to 1 (centred), 2 (others), sqrt(2) (z-score, std .7071)
    for p in (0.1, 0.5):
        assert expected_weight(group_center, p, 2) == pytest.approx(2 * p * (1 - p))
        assert expected_weight(leave_one_out, p, 2) == pytest.approx(4 * p * (1 - p))
        assert expected_weight(lambda r, g: group_zscore(r, g, eps=0.0), p, 2) == pytest.approx(
            2 * p * (1 - p) * 2**0.5, rel=1e-9
        )
    # G = 3 at p: k = 1 and 2 have std .57735 and sums of |A| 4/3, 4/3; centred 2 (G - 1) p q = 4 p q
    assert expected_weight(group_center, 0.2, 3) == pytest.approx(4 * 0.16)
    exact = (3 * 0.2 * 0.64 + 3 * 0.04 * 0.8) * (4 / 3) / (1 / 3) ** 0.5
    assert expected_weight(lambda r, g: group_zscore(r, g, eps=0.0), 0.2, 3) == pytest.approx(exact)
    # the z-score lifts both ends against the middle
    lifts = [expected_weight(f, 0.1, 8) / expected_weight(f, 0.5, 8) for f in (group_zscore, group_center)]
    assert lifts[1] == pytest.approx(0.09 / 0.25) and lifts[0] > 1.2 * lifts[1]


def test_the_bias_of_a_mixed_group_by_hand() -> None:
    # G = 3, p = .2: k = 1 has 3 x .2 x .64 = .384, k = 2 has 3 x .04 x .8 = .096: mean (.384 / 3 + .096 x 2 / 3) / .48
    assert mixed_mean_bias(0.2, 3) == pytest.approx(0.4 - 0.2)
    assert mixed_mean_bias(0.8, 3) == pytest.approx(-0.2)
    for p in (0.05, 0.3, 0.9):  # 2601.08521, lemma 2
        lemma = (p * (1 - p) ** 8 + p**9 - p**8) / (1 - (1 - p) ** 8 - p**8)
        assert mixed_mean_bias(p, 8) == pytest.approx(lemma)
    assert mixed_mean_bias(0.0, 8) == 1 / 8 == pytest.approx(mixed_mean_bias(1e-9, 8))
    assert mixed_mean_bias(1.0, 8) == -1 / 8
    with pytest.raises(ValueError, match="mixed_mean_bias: rate must be"):
        mixed_mean_bias(1.5, 8)


def test_a_token_budget_ends_the_run(make: Any, fit: Any) -> None:
    budget = TokenBudget(6)  # 3 tokens a phase that the policy sampled, and 2 of a tool: two of three phases
    called = make(token_ids=[7] * 5)
    called = replace(called, completion=replace(called.completion, sampled=[True, False, False, True, True]))
    assert fit(budget, [[called]] * 3).scalars("train/sampled_tokens") == [3, 6]
    resumed = TokenBudget(6)
    resumed.load_state_dict(budget.state_dict())
    assert resumed.sampled == 6
    with pytest.raises(ValueError, match="TokenBudget: tokens must be >= 1, got 0"):
        TokenBudget(0)

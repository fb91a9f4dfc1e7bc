"""Scores of cut-off completions, and rewards per token."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.losses.reward_shaping import penalize_missing_eos, token_rewards

DOUBLE = torch.float64
NAN = math.nan


def same(actual: Tensor, expected: list[float] | list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=0, equal_nan=True)


def test_missing_eos_hand_numbers() -> None:
    scores, stopped = torch.tensor([2.0, -3.0]), torch.tensor([True, False])
    same(
        penalize_missing_eos(scores, stopped, 1.0, replace=True), [2.0, -1.0]
    )  # -1 > -3: replacing can improve a score
    same(penalize_missing_eos(scores, stopped, 1.0, replace=False), [2.0, -4.0])  # -3 - 1
    same(penalize_missing_eos(scores, ~stopped, 1.0, replace=True), [-1.0, -3.0])
    same(penalize_missing_eos(scores, ~stopped, 1.0, replace=False), [1.0, -3.0])
    same(scores, [2.0, -3.0])


@pytest.mark.parametrize("replace", [True, False])
def test_missing_eos_against_a_loop_with_unscorable_completions(replace: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, stopped = torch.randn(12, dtype=DOUBLE, generator=generator), torch.rand(12, generator=generator) < 0.5
    scores[torch.tensor([2, 3, 7, 8])] = NAN
    assert stopped.any() and not stopped[scores.isnan()].all() and stopped[scores.isnan()].any()
    expected = []
    for score, ended in zip(scores.tolist(), stopped.tolist(), strict=True):
        expected.append(score if ended or math.isnan(score) else -0.7 if replace else score - 0.7)
    result = penalize_missing_eos(scores, stopped, 0.7, replace)
    assert result.dtype == DOUBLE
    same(result, expected)
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(
        penalize_missing_eos(scores[order], stopped[order], 0.7, replace), result[order], equal_nan=True
    )


def test_a_penalty_of_zero_and_a_wrong_one() -> None:
    scores, stopped = torch.tensor([2.0, -3.0, NAN]), torch.tensor([False, False, False])
    same(penalize_missing_eos(scores, stopped, 0.0, replace=False), [2.0, -3.0, NAN])
    same(penalize_missing_eos(scores, stopped, 0.0, replace=True), [0.0, 0.0, NAN])
    for penalty in (-1.0, NAN):
        with pytest.raises(ValueError, match=f"penalty is {penalty}, expected >= 0"):
            penalize_missing_eos(scores, stopped, penalty, replace=True)


def test_token_rewards_hand_numbers() -> None:
    scores = torch.tensor([1.0, -2.0, 0.5, NAN, 3.0])
    penalties = torch.tensor([[0.02, -0.04, 0.02]]).repeat(5, 1)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
    expected = [
        [-0.02, 0.04, 0.98],  # 1 - .02
        [-0.02, -1.96, 0.0],  # -2 + .04
        [-0.02, 0.0, 0.48],  # a gap
        [0.0, 0.0, 0.0],  # nothing kept
        [0.0, 3.04, 0.0],
    ]
    result = token_rewards(scores, penalties, mask)
    same(result, expected)
    assert not torch.allclose(
        result[0], token_rewards(scores, -penalties, mask)[0]
    )  # a likelier token than the reference's costs
    assert result[1, 1] != result[1, -1]  # the last kept column, not the last one


def test_token_rewards_against_a_loop_with_dirty_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, penalties = (
        torch.randn(6, dtype=DOUBLE, generator=generator),
        torch.randn(6, 7, dtype=DOUBLE, generator=generator),
    )
    mask = torch.rand(6, 7, generator=generator) < 0.5
    mask[4] = False
    scores[4], scores[1] = NAN, NAN
    assert mask[1].any()
    expected = [[0.0] * 7 for _ in range(6)]
    for i in range(6):
        kept = [t for t in range(7) if mask[i, t]]
        for t in kept:
            expected[i][t] = -penalties[i, t].item() + (scores[i].item() if t == kept[-1] else 0.0)
    for bad in (NAN, math.inf):
        dirty = penalties.masked_fill(~mask, bad)
        before = dirty.clone(), scores.clone(), mask.clone()
        result = token_rewards(scores, dirty, mask)
        same(result, expected)
        torch.testing.assert_close((dirty, scores, mask), before, atol=0, rtol=0, equal_nan=True)
    assert (
        result[1].isnan().sum() == 1 and not result[[0, 2, 3, 4, 5]].isnan().any()
    )  # an unscorable row shows it, once


@pytest.mark.parametrize("columns", [(0, 3), (3, 0), (2, 2)])
def test_padding_and_row_order_change_nothing(columns: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    scores, penalties = (
        torch.randn(4, dtype=DOUBLE, generator=generator),
        torch.randn(4, 5, dtype=DOUBLE, generator=generator),
    )
    mask = torch.rand(4, 5, generator=generator) < 0.7
    order = torch.tensor([3, 1, 0, 2])
    padded = token_rewards(scores[order], pad(penalties, columns, value=NAN)[order], pad(mask, columns)[order])
    torch.testing.assert_close(padded, pad(token_rewards(scores, penalties, mask), columns)[order], atol=0, rtol=0)
    sums = token_rewards(scores, penalties, mask).sum(1)
    torch.testing.assert_close(sums, (scores - (penalties * mask).sum(1)) * mask.any(1), atol=1e-12, rtol=0)

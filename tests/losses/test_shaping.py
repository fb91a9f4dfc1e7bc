"""Scores of completions that were cut off, rewards per token, and the weight of an adaptive KL."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.functional import kl as estimators
from modules.losses import GAE, KL, AdaptiveKL, MissingEos
from modules.losses.shaping import make_token_rewards

DOUBLE = torch.float64
NAN = math.nan


def same(actual: Tensor, expected: list[float] | list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=0, equal_nan=True)


def test_missing_eos_hand_numbers() -> None:
    scores, stopped = torch.tensor([2.0, -3.0]), torch.tensor([True, False])
    same(MissingEos(1.0, replace=True)(scores, stopped), [2.0, -1.0])  # -1 > -3: replacing can improve a score
    same(MissingEos(1.0)(scores, stopped), [2.0, -4.0])  # -3 - 1
    same(MissingEos(1.0, replace=True)(scores, ~stopped), [-1.0, -3.0])
    same(MissingEos(1.0)(scores, ~stopped), [1.0, -3.0])
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
    result = MissingEos(0.7, replace)(scores, stopped)
    assert result.dtype == DOUBLE
    same(result, expected)
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(MissingEos(0.7, replace)(scores[order], stopped[order]), result[order], equal_nan=True)


def test_a_penalty_of_zero_and_a_wrong_one() -> None:
    scores, stopped = torch.tensor([2.0, -3.0, NAN]), torch.tensor([False, False, False])
    same(MissingEos(0.0)(scores, stopped), [2.0, -3.0, NAN])
    same(MissingEos(0.0, replace=True)(scores, stopped), [0.0, 0.0, NAN])
    for penalty in (-1.0, NAN, math.inf):
        with pytest.raises(ValueError, match=f"missing_eos: penalty must be .*>= 0, got {penalty}"):
            MissingEos(penalty)


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
    result = make_token_rewards(scores, penalties, mask)
    same(result, expected)
    assert not torch.allclose(
        result[0], make_token_rewards(scores, -penalties, mask)[0]
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
        result = make_token_rewards(scores, dirty, mask)
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
    padded = make_token_rewards(scores[order], pad(penalties, columns, value=NAN)[order], pad(mask, columns)[order])
    torch.testing.assert_close(padded, pad(make_token_rewards(scores, penalties, mask), columns)[order], atol=0, rtol=0)
    sums = make_token_rewards(scores, penalties, mask).sum(1)
    torch.testing.assert_close(sums, (scores - (penalties * mask).sum(1)) * mask.any(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kl", "gain", "expected"),
    [
        (12.0, 0.1, 0.204),  # 12 / 6 - 1 = 1, clipped to .2: .2 * (1 + .1 * .2)
        (12.0, 512 / 10_000, 0.202048),  # .2 * (1 + .0512 * .2)
        (6.0, 0.1, 0.2),
        (3.0, 0.1, 0.196),  # -.5, clipped to -.2
        (3.0, 512 / 10_000, 0.197952),
        (6.6, 0.1, 0.202),  # .1, inside: .2 * (1 + .1 * .1)
        (5.4, 0.1, 0.198),
        (-50.0, 0.1, 0.196),  # k1 may be negative
    ],
)
def test_controller_hand_numbers(kl: float, gain: float, expected: float) -> None:
    result = AdaptiveKL(target=6.0, gain=gain)(0.2, kl, completions=99)
    assert result == pytest.approx(expected, abs=1e-12)
    if kl == 12:
        assert not math.isclose(result, 0.2 * math.exp(gain * 0.2), rel_tol=1e-6)  # linear, not exponential
        assert not math.isclose(result, 0.2 * (1 + gain))  # the error is clipped


def test_controller_keeps_zero_and_shows_a_nan() -> None:
    assert AdaptiveKL()(0.0, 100.0, 1) == 0.0
    assert math.isnan(AdaptiveKL()(0.2, math.nan, 1))
    assert AdaptiveKL()(0.2, math.inf, 1) == pytest.approx(0.204, abs=1e-12)
    # as in the released code, the gain is completions / horizon: .2 * (1 + .0512 * .2)
    assert AdaptiveKL(gain=None)(0.2, 12.0, completions=512) == pytest.approx(0.202048, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveKL(target=NAN), "adaptive KL: target must be finite and > 0"),
        (lambda: AdaptiveKL(target=math.inf), "target must be finite"),
        (lambda: AdaptiveKL(gain=0.0), "gain must be > 0"),
        (lambda: AdaptiveKL(horizon=0), "horizon must be >= 1"),
        (lambda: KL(coef=NAN), "kl: coef must be finite and >= 0"),
        (lambda: KL(coef=-0.1), "kl: coef must be >= 0"),
        (lambda: KL(coef=0.0, adaptive=AdaptiveKL()), "adaptive multiplies coef, and 0 stays 0"),
        (lambda: KL(loss=estimators.k1), "k1 as a loss has no gradient on average"),
        (lambda: GAE(gamma=1.1), "gae: gamma must be >= 0 and <= 1, got 1.1"),
        (lambda: GAE(gamma=-0.1, lam=NAN), "gamma must be .*; lam must be finite"),
    ],
)
def test_values_out_of_range_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()

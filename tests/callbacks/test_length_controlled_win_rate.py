"""Win rates, raw and controlled for length, and the regression behind the latter."""

import math

import pytest
import torch
from torch import Tensor

from callbacks.measures.preferences import (
    length_controlled_win_rate,
    logistic_regression,
    win_rate,
    win_rate_standard_error,
)

DOUBLE = torch.float64
BASELINE = 500  # characters


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def controlled(preference: Tensor, differences: Tensor) -> float:
    return length_controlled_win_rate(preference, BASELINE + differences, torch.full_like(differences, BASELINE))


def test_win_rate_counts_a_tie_as_half() -> None:
    assert win_rate(f64(1, 1, 0.5, 0)) == pytest.approx(62.5, abs=1e-9)
    assert win_rate(torch.tensor([1, 0, 1])) == pytest.approx(200 / 3, abs=1e-9)
    without_ties = 100 * 2 / 3
    assert abs(win_rate(f64(1, 1, 0.5, 0)) - without_ties) > 1


def test_standard_error_by_hand() -> None:
    # deviations from 5/8: 3/8 3/8 -1/8 -5/8, squares (9 + 9 + 1 + 25) / 64 = 44/64, over 3, over 4
    value = win_rate_standard_error(f64(1, 1, 0.5, 0))
    assert value == pytest.approx(100 * math.sqrt(44 / 64 / 3 / 4), abs=1e-9)
    population = 100 * math.sqrt(44 / 64 / 4 / 4)
    assert abs(value - population) > 1
    assert win_rate_standard_error(f64(1, 1, 1)) == 0.0
    assert win_rate_standard_error(f64(1)) == 50.0  # half of them could still be lost


def test_model_equal_to_baseline_has_exactly_half() -> None:
    assert controlled(torch.full((7,), 0.5), torch.zeros(7)) == 50.0
    assert controlled(torch.full((7,), 0.5), torch.arange(7.0)) == 50.0


@pytest.mark.parametrize("wins", [0, 1, 37, 99, 100])
@pytest.mark.parametrize("difference", [0.0, 80.0])
def test_equal_differences_leave_the_raw_rate(wins: int, difference: float) -> None:
    preference = (torch.arange(100) < wins).double()
    assert controlled(preference, torch.full((100,), difference)) == pytest.approx(win_rate(preference), abs=0.1)


def test_one_comparison() -> None:
    assert controlled(f64(1), f64(30)) == pytest.approx(100, abs=0.1)
    assert controlled(f64(0.5), f64(30)) == 50.0


def test_preference_for_length_alone_is_taken_off() -> None:
    # Longer wins with 0.9, and the model is longer in 160 of 200: raw 0.8 * 0.9 + 0.2 * 0.1 = 0.74.
    generator = torch.Generator().manual_seed(0)
    differences = torch.cat([torch.full((160,), 200.0), torch.full((40,), -200.0)])
    soft = torch.where(differences > 0, 0.9, 0.1)
    assert win_rate(soft) == pytest.approx(74, abs=1e-4)
    assert controlled(soft, differences) == pytest.approx(50, abs=0.5)  # the rest is the ridge
    sampled = (torch.rand(200, generator=generator) < soft).double()
    assert win_rate(sampled) > 65
    assert controlled(sampled, differences) == pytest.approx(50, abs=10)
    varied = differences * (0.5 + torch.rand(200, generator=generator))
    assert controlled(soft, varied) == pytest.approx(50, abs=5)


def test_quality_survives_length_control() -> None:
    differences = 300 * torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=DOUBLE) + 150
    term = (differences / differences.std()).tanh()
    for theta, phi in [(0.8, 1.5), (-0.4, 1.0), (0.8, 0.0), (0.5, -1.2)]:
        preference = (theta + phi * term).sigmoid()
        value = controlled(preference, differences)
        assert value == pytest.approx(100 / (1 + math.exp(-theta)), abs=0.5)
        if phi > 0:
            assert win_rate(preference) > value + 3


def test_the_term_is_the_tanh_of_differences_in_sample_stds() -> None:
    differences = f64(-400, -100, 50, 900)
    std = math.sqrt(sum((x - 112.5) ** 2 for x in differences.tolist()) / 3)  # mean (-500 + 950) / 4
    preference = torch.sigmoid(0.7 + 2 * torch.tanh(differences / std))
    exact = 100 / (1 + math.exp(-0.7))
    assert controlled(preference, differences) == pytest.approx(exact, abs=0.2)
    linear = torch.sigmoid(0.7 + 2 * differences / std)
    assert abs(controlled(linear, differences) - exact) > 1


def test_symmetry_order_and_repetition() -> None:
    generator = torch.Generator().manual_seed(2)
    differences, preference = (
        100 * torch.randn(60, generator=generator) + 40,
        torch.randint(3, (60,), generator=generator) / 2,
    )
    value = controlled(preference, differences)
    assert controlled(1 - preference, -differences) == pytest.approx(
        100 - value, abs=1e-6
    )  # model and baseline change places
    order = torch.randperm(60, generator=generator)
    assert controlled(preference[order], differences[order]) == pytest.approx(value, abs=1e-6)
    assert controlled(preference, 10 * differences) == pytest.approx(
        value, abs=1e-3
    )  # units of length; BASELINE + d is float32
    assert controlled(preference, -differences) == pytest.approx(
        value, abs=1e-6
    )  # it matters only that length goes with winning
    assert abs(controlled(preference, differences.roll(1)) - value) > 0.1


def test_one_sided_results_stay_finite() -> None:
    differences = torch.linspace(-300, 500, 50)
    assert 99.9 < controlled(torch.ones(50), differences) <= 100
    assert 0 <= controlled(torch.zeros(50), differences) < 0.1
    longer_always_wins = (differences > 0).double()
    assert 0 < controlled(longer_always_wins, differences) < win_rate(longer_always_wins)


@pytest.mark.parametrize("preference", [f64(), f64(0.5, 1.2), f64(-0.1, 1), f64(math.nan, 1), torch.ones(2, 2)])
def test_what_is_no_preference_is_refused(preference: Tensor) -> None:
    for function in (win_rate, win_rate_standard_error, lambda x: controlled(x, torch.zeros(x.shape))):
        with pytest.raises(ValueError, match=r"at least one preference, shape \[N\], in \[0, 1\]"):
            function(preference)


def test_unequal_lengths_are_refused() -> None:
    for lengths in ((f64(1), f64(1, 2)), (f64(1, 2), f64(1)), (f64(1, 2, 3), f64(1, 2, 3))):
        with pytest.raises(ValueError, match=r"shapes are .*expected \[N\] each"):
            length_controlled_win_rate(f64(1, 0), *lengths)


def test_logistic_regression_against_plain_gradient_descent() -> None:
    generator = torch.Generator().manual_seed(3)
    features, outcome = (
        torch.randn(30, 3, generator=generator, dtype=DOUBLE),
        torch.rand(30, generator=generator, dtype=DOUBLE),
    )
    ridge = f64(0.01, 0.1, 0.5)
    slow = torch.zeros(3, dtype=DOUBLE)
    for _ in range(3000):
        slow -= 0.5 * (features.T @ ((features @ slow).sigmoid() - outcome) / 30 + ridge * slow)
    torch.testing.assert_close(logistic_regression(features, outcome, ridge), slow, atol=1e-9, rtol=0)
    # a soft outcome p is two rows weighted p and 1 - p: here two wins and one loss
    hard = logistic_regression(features[:1].repeat(3, 1), f64(1, 1, 0), ridge)
    torch.testing.assert_close(logistic_regression(features[:1], f64(2 / 3), ridge), hard, atol=1e-9, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
def test_logistic_regression_meets_its_optimum_on_separable_data(scale: float) -> None:
    features = scale * torch.randn(40, 2, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    outcome, ridge = (features[:, 0] > 0).double(), f64(1e-6, 1e-3)
    weights = logistic_regression(features, outcome, ridge)
    gradient = features.T @ ((features @ weights).sigmoid() - outcome) / 40 + ridge * weights
    assert gradient.abs().max() < 1e-7
    assert ((features @ weights > 0) == (outcome > 0.5)).all()


def test_full_newton_steps_would_run_away() -> None:
    for seed in range(40):  # without step halving 12, 31 and 34 end at weights of 1e5
        features = torch.randn(22, 2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) ** 3
        outcome, ridge = (features[:, 0] > features[:, 1]).double(), f64(1e-6, 1e-6)
        weakest = features.abs().sum(1).argmin()
        outcome[weakest] = 1 - outcome[weakest]  # nearly separable: the curvature vanishes before the optimum
        weights = logistic_regression(features, outcome, ridge)
        gradient = features.T @ ((features @ weights).sigmoid() - outcome) / 22 + ridge * weights
        assert gradient.abs().max() < 1e-9

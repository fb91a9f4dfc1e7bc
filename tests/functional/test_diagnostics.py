"""The functions of modules.functional.diagnostics against arithmetic in the test, or against a loop over all cases."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.functional.diagnostics import (
    best_of_n_curve,
    best_of_n_fit,
    best_of_n_kl,
    distinct_n,
    ece,
    overoptimization_fit,
    pass_at_k,
    pearson,
    within_group_correlation,
)

ATOL = 1e-9


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def naive_pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def test_distinct_n_hand_case() -> None:
    sequences = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n(sequences, 2) == pytest.approx(3 / 5, abs=ATOL)  # 12 21 12 | 12 23
    assert distinct_n(sequences, 1) == pytest.approx(3 / 7, abs=ATOL)
    mean_of_sequences = (2 / 3 + 2 / 2) / 2
    assert abs(distinct_n(sequences, 2) - mean_of_sequences) > 0.1


def test_distinct_n_limits() -> None:
    assert distinct_n([[5, 6, 7]] * 4, 2) == pytest.approx(2 / 8, abs=ATOL)
    assert distinct_n([[1, 2, 3]], 3) == 1.0
    assert distinct_n([[1], []], 2) == 0.0
    with pytest.raises(ValueError, match="n=0"):
        distinct_n([[1]], 0)


def test_pass_at_k_hand_case_and_enumeration() -> None:
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252, abs=ATOL)  # C(7,5)/C(10,5)
    biased = 1 - (1 - 3 / 10) ** 5
    assert abs(pass_at_k(10, 3, 5) - biased) > 0.05
    for n, c, k in [(6, 0, 3), (6, 2, 1), (6, 2, 4), (6, 2, 5), (6, 6, 6)]:
        draws = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws), abs=ATOL)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"samples={n}, correct={c}, k={k}"):
        pass_at_k(n, c, k)


def test_ece_hand_case() -> None:
    confidence = f64(*[0.9] * 10, *[0.6] * 10)
    correct = torch.tensor([1] * 7 + [0] * 3 + [1] * 6 + [0] * 4, dtype=torch.bool)
    assert ece(confidence, correct) == pytest.approx(10 / 20 * abs(0.7 - 0.9) + 10 / 20 * abs(0.6 - 0.6), abs=ATOL)
    assert ece(confidence, correct, num_bins=1) == pytest.approx(abs(13 / 20 - 0.75), abs=ATOL)


def test_ece_takes_gaps_per_bin_before_adding() -> None:
    confidence, correct = f64(0.25, 0.75), f64(1, 0)
    assert ece(confidence, correct) == pytest.approx(0.5 * 0.75 + 0.5 * 0.75, abs=ATOL)  # signed gaps would cancel to 0
    assert ece(confidence, correct, num_bins=1) == pytest.approx(0.0, abs=ATOL)


def test_ece_bin_edges_close_on_the_right() -> None:
    # With 2 bins 0.5 falls in (0, 0.5] beside 0.1: |(1 - 0.5) + (0 - 0.1)| = 0.4; on the left-closed reading it would
    # be 0.5 + 0.1.
    assert ece(f64(0.5, 0.1), f64(1, 0), num_bins=2) == pytest.approx(0.4 / 2, abs=ATOL)
    assert ece(f64(0.0, 1.0), f64(0, 1)) == 0.0
    assert ece(f64(), f64()) == 0.0


@pytest.mark.parametrize("confidence", [f64(1.2, 0.5), f64(-0.1, 0.5), f64(math.nan, 0.5)])
def test_ece_refuses_what_is_no_probability(confidence: Tensor) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        ece(confidence, f64(1, 0))


def test_ece_refuses_unequal_lengths_and_no_bins() -> None:
    with pytest.raises(ValueError, match="one outcome per confidence"):
        ece(f64(0.5), f64(1, 0))
    with pytest.raises(ValueError, match="num_bins"):
        ece(f64(0.5), f64(1), num_bins=0)


def test_pearson_against_a_naive_loop() -> None:
    generator = random.Random(0)
    x, y = [generator.gauss(3, 2) for _ in range(50)], [generator.gauss(-1, 5) for _ in range(50)]
    assert pearson(f64(*x), f64(*y)) == pytest.approx(naive_pearson(x, y), abs=ATOL)
    # x - 2 = (-1, 0, 1), y - 2 = (-1, 1, 0): 1 / sqrt(2 * 2)
    assert pearson(f64(1, 2, 3), f64(1, 3, 2)) == pytest.approx(0.5, abs=ATOL)


def test_pearson_limits() -> None:
    lengths = f64(3, 8, 1, 20)
    assert pearson(0.01 * lengths, lengths) == pytest.approx(1.0, abs=ATOL)
    assert pearson(-lengths, lengths) == pytest.approx(-1.0, abs=ATOL)
    assert (
        pearson(f64(0.1, 0.1, 0.1, 0.1), lengths) == 0.0
    )  # the mean of three or more 0.1 is not 0.1 in floating point
    assert pearson(f64(2), f64(3)) == 0.0
    assert pearson(f64(), f64()) == 0.0
    with pytest.raises(ValueError, match="vectors of one length"):
        pearson(f64(1, 2), f64(1, 2, 3))


def test_within_group_correlation_takes_the_group_means_off() -> None:
    # Two prompts: inside each, longer is worse; across them, the long one is better. Deviations: x -1 1 -1 1, y 1 -1 1
    # -1.
    x, y, group = f64(1, 3, 101, 103), f64(2, 0, 12, 10), torch.tensor([7, 7, 2, 2])
    assert within_group_correlation(x, y, group) == pytest.approx(-1.0, abs=ATOL)
    assert pearson(x, y) > 0.9


def test_within_group_correlation_pools_the_deviations() -> None:
    # Group a: x -1 0 1, y -1 1 0, products 1. Group b: x -2 2, y -1 1, products 4. 5 / sqrt((2 + 8) (2 + 2)).
    x, y = f64(1, 2, 3, 10, 14), f64(1, 3, 2, 5, 7)
    value = within_group_correlation(x, y, torch.tensor([0, 0, 0, 1, 1]))
    assert value == pytest.approx(5 / math.sqrt(40), abs=ATOL)
    mean_of_groups = (0.5 + 1.0) / 2
    assert abs(value - mean_of_groups) > 0.03


def test_within_group_correlation_invariances() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    group = torch.arange(12) // 3
    value = within_group_correlation(x, y, group)
    order = torch.randperm(12, generator=generator)
    assert within_group_correlation(x[order], y[order], group[order]) == pytest.approx(value, abs=ATOL)
    assert within_group_correlation(x, y, 100 - 7 * group) == pytest.approx(value, abs=ATOL)
    assert within_group_correlation(2 * x + 5.0 * group, y, group) == pytest.approx(value, abs=ATOL)
    padded = (torch.cat([x, f64(9)]), torch.cat([y, f64(-9)]), torch.cat([group, torch.tensor([50])]))
    assert within_group_correlation(*padded) == pytest.approx(value, abs=ATOL)  # a group of one says nothing


def test_within_group_correlation_is_zero_without_variation() -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    assert within_group_correlation(f64(0.1, 0.1, 0.1, 0.7, 0.7, 0.7), f64(1, 2, 3, 4, 5, 6), group) == 0.0
    noisy = f64(
        *[0.1] * 6
        # 0.1 + 0.1 + 0.1 is not 0.3 in floating point: a plain mean leaves the same residue in all, which correlates
        # fully
    )
    assert within_group_correlation(noisy, noisy, group) == 0.0
    assert within_group_correlation(f64(1, 2, 3), f64(3, 2, 2), torch.tensor([0, 1, 2])) == 0.0


def test_random_rewards_do_not_correlate_with_length() -> None:
    generator = torch.Generator().manual_seed(1)
    n = 4000
    x, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
    assert abs(within_group_correlation(x, y, torch.arange(n) // 8)) < 3 / math.sqrt(n)


DISTANCE = f64(1, 2, 3)
RL_GOLD = f64(2.0, 2 * (2 - 0.5 * math.log(2)), 3 * (2 - 0.5 * math.log(3)))  # alpha 2, beta 0.5
BEST_OF_N_GOLD = f64(1.5, 2.0, 1.5)  # 1 (2 - .5), 2 (2 - 1), 3 (2 - 1.5)


def test_fits_recover_alpha_and_beta() -> None:
    assert RL_GOLD.tolist() == pytest.approx([2.0, 3.306853, 4.352082], abs=1e-6)
    assert overoptimization_fit(DISTANCE, RL_GOLD) == pytest.approx((2.0, 0.5), abs=ATOL)
    assert best_of_n_fit(DISTANCE, BEST_OF_N_GOLD) == pytest.approx((2.0, 0.5), abs=ATOL)
    assert abs(best_of_n_fit(DISTANCE, RL_GOLD)[1] - 0.5) > 0.1
    alpha, beta = overoptimization_fit(DISTANCE, RL_GOLD)
    assert math.exp(alpha / beta - 1) == pytest.approx(20.0855, abs=1e-4)


def test_fits_leave_out_the_start() -> None:
    with_start = torch.cat([f64(0), DISTANCE])
    assert overoptimization_fit(with_start, torch.cat([f64(0), RL_GOLD])) == pytest.approx((2.0, 0.5), abs=ATOL)
    assert best_of_n_fit(with_start, torch.cat([f64(0), BEST_OF_N_GOLD])) == pytest.approx((2.0, 0.5), abs=ATOL)


@pytest.mark.parametrize("fit", [overoptimization_fit, best_of_n_fit])
def test_fits_refuse_what_has_no_answer(fit: Callable[[Tensor, Tensor], tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="two different positive distances"):
        fit(f64(0, 2, 2), f64(0, 1, 3))
    with pytest.raises(ValueError, match="non-negative"):
        fit(f64(-1, 2), f64(0, 1))
    with pytest.raises(ValueError, match="one gold reward"):
        fit(f64(1, 2), f64(1))


def test_best_of_n_curve_hand_case() -> None:
    rewards = f64(3, 1, 4, 2)
    # Pairs of 1..4: the best is 2 once, 3 twice, 4 three times: (2 + 6 + 12) / 6.
    assert best_of_n_curve(rewards, rewards, 2) == pytest.approx(20 / 6, abs=ATOL)
    assert best_of_n_curve(rewards, rewards, 1) == pytest.approx(2.5, abs=ATOL)
    assert best_of_n_curve(rewards, rewards, 4) == pytest.approx(4.0, abs=ATOL)
    assert best_of_n_curve(-rewards, rewards, 2) == pytest.approx(
        10 / 6, abs=ATOL
    )  # the worst: 1 three times, 2 twice, 3 once


def test_best_of_n_curve_against_all_subsets() -> None:
    generator = random.Random(2)
    proxy, gold = [generator.random() for _ in range(7)], [generator.random() for _ in range(7)]
    for n in range(1, 8):
        picked = [gold[max(subset, key=proxy.__getitem__)] for subset in itertools.combinations(range(7), n)]
        assert best_of_n_curve(f64(*proxy), f64(*gold), n) == pytest.approx(sum(picked) / len(picked), abs=ATOL)


def test_best_of_n_curve_draws_ties_at_random() -> None:
    # Proxy 0 0 1 1, n = 2: five of six pairs hold a 1. Expected gold: 5/6 mean(6, 8) + 1/6 mean(2, 4).
    expected = 5 / 6 * 7 + 1 / 6 * 3
    rows = [(0.0, 2.0), (0.0, 4.0), (1.0, 6.0), (1.0, 8.0)]
    for order in itertools.permutations(rows):
        proxy, gold = zip(*order, strict=True)
        assert best_of_n_curve(f64(*proxy), f64(*gold), 2) == pytest.approx(expected, abs=ATOL)


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_n_curve_refuses_n_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}"):
        best_of_n_curve(f64(1, 2, 3), f64(1, 2, 3), n)


def test_best_of_n_kl_table() -> None:
    for n, expected in [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508), (1000, 5.908755)]:
        assert best_of_n_kl(n) == pytest.approx(expected, abs=1e-6)
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5, abs=ATOL)
    with pytest.raises(ValueError, match="n >= 1"):
        best_of_n_kl(0)

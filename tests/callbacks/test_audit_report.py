"""The audit of scores against length and style: cases by hand, controls without an effect, and a score that is only
length.
"""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from callbacks.measures.scored_pairs import (
    audit_report,
    brier,
    preference_calibration,
    spearman,
    style_features,
    style_regression,
    within_group_spearman,
)
from modules.types import ScoredPair

ATOL = 1e-9


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pair(
    prompt: str,
    chosen_length: int,
    rejected_length: int,
    chosen_score: float,
    rejected_score: float,
    prompt_length: int = 5,
) -> ScoredPair:
    """Make a pair from two texts, with their lengths."""
    texts = "c" * chosen_length, "r" * rejected_length
    return ScoredPair(prompt, prompt_length, *texts, chosen_length, rejected_length, chosen_score, rejected_score)


def random_pairs(number: int, seed: int = 0) -> list[ScoredPair]:
    """Make pairs whose lengths and scores are unrelated, except that some prompts raise both."""
    generator = random.Random(seed)
    pairs = []
    for i in range(number):
        level = generator.randrange(100)
        lengths = [level + generator.randrange(1, 50) for _ in range(2)]
        pairs.append(
            pair(
                f"p{i}",
                *lengths,
                *(level + generator.gauss(0, 1) for _ in range(2)),
                prompt_length=generator.randrange(20),
            )
        )
    return pairs


def test_spearman_hand_cases() -> None:
    # ranks 1 2 3 4 and 1 2 4 3: 1 - 6 (0 + 0 + 1 + 1) / (4 * 15)
    assert spearman(f64(1, 2, 30, 400), f64(5, 6, 8, 7)) == pytest.approx(1 - 12 / 60, abs=ATOL)
    # ties share their mean rank: 1.5 1.5 3 against 1 2 3, deviations -.5 -.5 1 and -1 0 1
    assert spearman(f64(7, 7, 9), f64(1, 2, 3)) == pytest.approx(1.5 / math.sqrt(1.5 * 2), abs=ATOL)
    ties_by_order = 1.0
    assert abs(spearman(f64(7, 7, 9), f64(1, 2, 3)) - ties_by_order) > 0.1
    assert spearman(f64(3, 1, 2), f64(3, 1, 2).exp()) == pytest.approx(1.0, abs=ATOL)
    assert spearman(f64(3, 1, 2), -f64(3, 1, 2).exp()) == pytest.approx(-1.0, abs=ATOL)
    assert spearman(f64(0.1, 0.1, 0.1), f64(1, 2, 3)) == spearman(f64(), f64()) == spearman(f64(1), f64(2)) == 0.0
    with pytest.raises(ValueError, match="vectors of one length"):
        spearman(f64(1, 2), f64(1, 2, 3))


def test_spearman_against_a_loop_over_ranks() -> None:
    generator = random.Random(1)
    x, y = [generator.randrange(6) for _ in range(30)], [generator.gauss(0, 1) for _ in range(30)]

    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    rank_x, rank_y = ranks(x), ranks(y)
    mean = 31 / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(rank_x, rank_y, strict=True))
    expected = covariance / math.sqrt(sum((a - mean) ** 2 for a in rank_x) * sum((b - mean) ** 2 for b in rank_y))
    assert spearman(f64(*x), f64(*y)) == pytest.approx(expected, abs=ATOL)


def test_within_group_spearman_takes_the_group_means_off_first() -> None:
    # Inside both prompts longer is worse; across them longer is better.
    x, y, group = f64(1, 3, 101, 103), f64(2, 0, 12, 10), torch.tensor([7, 7, 2, 2])
    assert within_group_spearman(x, y, group) == pytest.approx(-1.0, abs=ATOL)
    assert spearman(x, y) > 0.5
    # Deviations -1 1 -5 5 and -2 2 3 -3: ranks 2 3 1 4 and 2 3 4 1, squares of differences 0 0 9 9.
    assert within_group_spearman(f64(0, 2, 0, 10), f64(0, 4, 6, 0), torch.tensor([0, 0, 1, 1])) == pytest.approx(
        1 - 6 * 18 / 60, abs=ATOL
    )
    ranks_inside_each_prompt = 0.0  # one prompt agrees, the other does not
    assert (
        within_group_spearman(f64(0, 2, 0, 10), f64(0, 4, 6, 0), torch.tensor([0, 0, 1, 1]))
        < ranks_inside_each_prompt - 0.5
    )
    noisy = f64(*[0.1] * 3, *[0.7] * 3)  # a plain mean leaves residues of rounding, which ranks would blow up
    assert within_group_spearman(noisy, f64(1, 2, 3, 4, 5, 6), torch.tensor([0, 0, 0, 1, 1, 1])) == 0.0


def test_style_features_count_markdown() -> None:
    text = "# Title\n\n- one\n* two **bold** and **more bold**\n  + three\n1. four\n12) five\n\n## Part\nend"
    assert style_features(text) == {"length": len(text), "list_items": 5, "headers": 2, "bold": 2}


@pytest.mark.parametrize("text", [
    "", "plain", "**", "****", "a - b", "-5 degrees", "1.5 litres", "#hashtag", "*emphasis* only", "a **b\nc** d", "** spaced **", "2 * 3 * 4",
    "---", "-\nx",
])  # fmt: skip
def test_what_is_no_markdown_counts_nothing(text: str) -> None:
    assert style_features(text) == {"length": len(text), "list_items": 0, "headers": 0, "bold": 0}


def test_bold_line_is_no_list_item() -> None:
    assert style_features("**Note** this") == {"length": 13, "list_items": 0, "headers": 0, "bold": 1}


def test_style_regression_finds_what_moves_the_preference() -> None:
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * f64(100, 2, 0.5)
    differences[:, 2] = 0.0
    scale = differences.square().mean(0).sqrt()[:2]
    truth = f64(1.2, -0.7)
    probability = (differences[:, :2] / scale @ truth).sigmoid()
    coefficients = style_regression(differences, probability)
    assert coefficients.tolist() == pytest.approx([1.2, -0.7, 0.0], abs=0.02)  # what is missing is the ridge
    sampled = (torch.rand(4000, generator=generator) < probability).double()
    assert style_regression(differences, sampled).tolist() == pytest.approx([1.2, -0.7, 0.0], abs=0.15)
    noise = (torch.rand(4000, generator=generator) < 0.5).double()
    assert style_regression(differences, noise).abs().max() < 3 * 2 / math.sqrt(
        4000
    )  # the standard error at p = 1/2 is 2 / sqrt(N)
    torch.testing.assert_close(
        style_regression(differences * f64(0.01, 5, 1), probability), coefficients, atol=1e-6, rtol=0
    )


def test_style_regression_does_not_care_which_completion_is_first() -> None:
    generator = torch.Generator().manual_seed(1)
    differences, outcome = (
        torch.randn(50, 2, generator=generator) + 0.5,
        torch.randint(3, (50,), generator=generator) / 2,
    )
    turned = torch.where(torch.rand(50, generator=generator) < 0.5, -1.0, 1.0)
    value = style_regression(differences, outcome)
    torch.testing.assert_close(
        style_regression(differences * turned[:, None], (outcome - 0.5) * turned + 0.5), value, atol=1e-6, rtol=0
    )
    assert not torch.allclose(style_regression(differences * turned[:, None], outcome), value, atol=0.05)
    assert style_regression(differences, torch.full((50,), 0.5)).tolist() == [0.0, 0.0]


def test_style_regression_on_separable_data_stays_finite() -> None:
    # One feature, always +1: mean cross-entropy log(1 + exp(-w)) + 0.0005 w^2, lowest where sigma(-w) = 0.001 w.
    weight = style_regression(torch.ones(20, 1), torch.ones(20)).item()
    assert 1 / (1 + math.exp(weight)) == pytest.approx(0.001 * weight, abs=1e-8)
    assert 5 < weight < 6
    assert style_regression(torch.zeros(4, 2), torch.ones(4)).tolist() == [0.0, 0.0]


def test_brier_and_calibration_by_hand() -> None:
    assert brier(f64(0.9, 0.6), torch.tensor([True, False])) == pytest.approx((0.1**2 + 0.6**2) / 2, abs=ATOL)
    assert brier(f64(), f64()) == 0.0
    # d = log 3, -log 3, 0: confidence 0.75 right, 0.75 wrong, 0.5 half right.
    chosen, rejected = f64(math.log(3), 1, 7), f64(0, 1 + math.log(3), 7)
    calibration_error, brier_score = preference_calibration(chosen, rejected)
    assert calibration_error == pytest.approx((2 * abs(0.5 - 0.75) + abs(0.5 - 0.5)) / 3, abs=ATOL)
    assert brier_score == pytest.approx((0.25**2 + 0.75**2 + 0) / 3, abs=ATOL)
    probability_of_chosen = (0.25**2 + 0.75**2 + 0.5**2) / 3
    assert abs(brier_score - probability_of_chosen) > 0.05
    assert preference_calibration(f64(1e4, 3), f64(-1e4, 1e4)) == pytest.approx(
        (0.5, 0.5), abs=ATOL
    )  # sure twice, right once


def test_scores_drawn_from_their_own_model_are_calibrated() -> None:
    generator = torch.Generator().manual_seed(2)
    difference = 2 * torch.randn(4000, generator=generator, dtype=torch.float64)
    holds = torch.rand(4000, generator=generator, dtype=torch.float64) < difference.sigmoid()
    difference = torch.where(holds, difference, -difference)  # chosen is what the model's own probability chose
    assert preference_calibration(difference, torch.zeros(4000))[0] < 0.03
    assert preference_calibration(5 * difference, torch.zeros(4000))[0] > 0.08


def test_report_hand_case() -> None:
    pairs = [
        pair("a", 4, 2, 3.0, 1.0, prompt_length=1),  # longer, right
        pair("b", 1, 3, 2.0, 2.0, prompt_length=2),  # shorter, a tie
        pair("c", 100, 95, 0.0, 1.0, prompt_length=3),  # longer and similar, wrong
        pair("d", 7, 7, 2.0, 1.5, prompt_length=9),  # equal length, right
    ]
    pairs[0], pairs[1], pairs[3] = (
        replace(pairs[0], margin=3.0),
        replace(pairs[1], margin=1 / 3),
        replace(pairs[3], margin=3.0),
    )
    report = audit_report(pairs)
    expected = {
        "pairs": 4,
        "margin": (2 + 0 - 1 + 0.5) / 4,
        "accuracy": 2.5 / 4,
        "accuracy_chosen_shorter": 0.5,
        "accuracy_chosen_longer": 1 / 2,
        "accuracy_similar_length": 1 / 2,  # c: 5 of 100; d
        "longer_wins": 2.5 / 4,
        "accuracy_short_prompts": 1.5 / 2,
        "accuracy_medium_prompts": 0.0,
        "accuracy_long_prompts": 1.0,
        "accuracy_margin_0.333333": 0.5,
        "accuracy_margin_3": 1.0,
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected, abs=ATOL)
    style = {
        f"{prefix}/{name}" for prefix in ("style", "data_style") for name in ("length", "list_items", "headers", "bold")
    }
    correlations = {
        f"score_length_{kind}{where}" for kind in ("pearson", "spearman") for where in ("", "_within_prompt")
    }
    assert set(report) == set(expected) | style | correlations | {"ece", "brier"}
    assert all(type(value) is float and math.isfinite(value) for value in report.values())
    assert (report["ece"], report["brier"]) == preference_calibration(f64(3, 2, 0, 2), f64(1, 2, 1, 1.5))
    lengths, scores = f64(4, 2, 1, 3, 100, 95, 7, 7), f64(3, 1, 2, 2, 0, 1, 2, 1.5)
    # within prompts lengths deviate by 1 1 2.5 0 and scores by 1 0 -.5 .25, signs of the chosen side: products 1 and
    # -1.25, twice
    within = (1 + 0 - 1.25) / math.sqrt((1 + 1 + 2.5**2) * (1 + 0 + 0.5**2 + 0.25**2))
    assert report["score_length_pearson_within_prompt"] == pytest.approx(within, abs=ATOL)
    assert report["score_length_pearson"] == pytest.approx(
        torch.corrcoef(torch.stack([lengths, scores]))[0, 1].item(), abs=ATOL
    )
    assert report["score_length_spearman"] == pytest.approx(spearman(lengths, scores), abs=ATOL)


def test_a_score_that_is_length() -> None:
    pairs = [
        replace(p, chosen_score=0.01 * p.chosen_length, rejected_score=0.01 * p.rejected_length)
        for p in random_pairs(200)
    ]
    report = audit_report(pairs)
    for kind, where in itertools.product(("pearson", "spearman"), ("", "_within_prompt")):
        assert report[f"score_length_{kind}{where}"] == pytest.approx(
            1.0, abs=1e-3 if (kind, where) == ("spearman", "_within_prompt") else ATOL
        )
    assert report["accuracy_chosen_shorter"] == 0.0
    assert report["accuracy_chosen_longer"] == 1.0
    assert report["accuracy"] == report["longer_wins"]
    assert report["style/length"] > 3 > 1 > abs(report["data_style/length"])  # the data chose at random


def test_a_score_that_ignores_length() -> None:
    number = 500
    report = audit_report(random_pairs(number))
    assert report["score_length_pearson"] > 0.5  # prompts raise both
    bound = 3 / math.sqrt(2 * number)
    assert abs(report["score_length_pearson_within_prompt"]) < bound
    assert abs(report["score_length_spearman_within_prompt"]) < bound
    assert abs(report["accuracy"] - 0.5) < 3 * 0.5 / math.sqrt(number)
    assert abs(report["style/length"]) < 3 * 2 / math.sqrt(number)


def test_style_coefficients_tell_the_score_from_the_data() -> None:
    generator = random.Random(3)
    pairs = []
    for i in range(300):
        bold, items = [generator.randrange(4) for _ in range(2)], [generator.randrange(4) for _ in range(2)]
        if bold[0] < bold[1]:
            bold.reverse()  # the data prefer bold, the score prefers lists
        texts = [("**b** " * b + "\n- x" * k).ljust(40, ".") for b, k in zip(bold, items, strict=True)]  # of one length
        pairs.append(ScoredPair(f"p{i}", 5, *texts, 10, 10, float(items[0]), float(items[1])))
    report = audit_report(pairs)
    assert report["style/list_items"] > 2 > 1 > abs(report["style/bold"])
    assert report["data_style/bold"] > 2 > 1 > abs(report["data_style/list_items"])
    assert report["style/headers"] == report["data_style/headers"] == 0.0


def test_a_completion_in_several_pairs_counts_once_in_correlations() -> None:
    # One prompt, three completions of lengths 1 2 6 with scores 0 2 1: their three pairs hold each twice.
    parts = {"x": (1, 0.0), "y": (2, 2.0), "z": (6, 1.0)}
    pairs = [
        ScoredPair("p", 5, a, b, parts[a][0], parts[b][0], parts[a][1], parts[b][1])
        for a, b in itertools.combinations("xyz", 2)
    ]
    report, lopsided = audit_report(pairs), audit_report(pairs[:2])  # x twice
    expected = torch.corrcoef(torch.stack([f64(1, 2, 6), f64(0, 2, 1)]))[0, 1].item()
    for found in (report, lopsided):
        assert found["score_length_pearson"] == pytest.approx(expected, abs=ATOL)
        assert found["score_length_pearson_within_prompt"] == pytest.approx(expected, abs=ATOL)
    with_repetition = torch.corrcoef(torch.stack([f64(1, 2, 1, 6), f64(0, 2, 0, 1)]))[0, 1].item()
    assert abs(expected - with_repetition) > 0.01


@pytest.mark.parametrize(("lengths", "sizes"), [
    ([1, 2, 3], (1, 1, 1)), ([3, 1, 2, 6, 5, 4], (2, 2, 2)), ([4, 4, 4], (3, 0, 0)), ([1, 9], (1, 0, 1)), ([1, 1, 1, 1, 2], (4, 0, 1)),
    ([7], (1, 0, 0)),
])  # fmt: skip
def test_prompt_terciles(lengths: list[int], sizes: tuple[int, int, int]) -> None:
    # A pair is right where its prompt is in the tercile: its accuracy is then 1 and that of the others 0.
    report = audit_report([pair(f"p{i}", 2, 1, 1.0, 0.0, prompt_length=length) for i, length in enumerate(lengths)])
    names = [f"accuracy_{name}_prompts" for name in ("short", "medium", "long")]
    assert [name in report for name in names] == [size > 0 for size in sizes]
    edges = [sum(sizes[:1]), sum(sizes[:2])]
    ordered = sorted(lengths)
    for name, members in zip(
        names, (ordered[: edges[0]], ordered[edges[0] : edges[1]], ordered[edges[1] :]), strict=True
    ):
        scored = [
            pair(f"p{i}", 2, 1, float(length in members), 0.5, prompt_length=length) for i, length in enumerate(lengths)
        ]
        assert audit_report(scored).get(name, 1.0) == 1.0
        assert all(audit_report(scored).get(other, 0.0) == 0.0 for other in names if other != name)


def test_absent_subsets_and_many_margins() -> None:
    assert audit_report([]) == {"pairs": 0.0}
    report = audit_report([pair("a", 9, 2, 1.0, 0.0)])
    assert not {"accuracy_chosen_shorter", "accuracy_similar_length", "accuracy_medium_prompts"} & set(report)
    assert not any("margin_" in name for name in report)
    for number in (8, 9):
        pairs = [replace(pair(f"p{i}", 2, 1, 1.0, 0.0), margin=i / 4) for i in range(number)]
        assert len([name for name in audit_report(pairs) if name.startswith("accuracy_margin_")]) == (
            8 if number == 8 else 0
        )


def test_report_does_not_depend_on_order_or_repeated_prompts() -> None:
    pairs = random_pairs(60)
    report = audit_report(pairs)
    shuffled = random.Random(5).sample(pairs, len(pairs))
    assert audit_report(shuffled) == pytest.approx(report, abs=1e-6)
    one_prompt = audit_report([replace(p, prompt="p") for p in pairs])
    assert one_prompt["score_length_pearson_within_prompt"] == pytest.approx(report["score_length_pearson"], abs=ATOL)
    assert one_prompt["score_length_pearson_within_prompt"] > report["score_length_pearson_within_prompt"] + 0.3

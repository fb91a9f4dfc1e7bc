"""Measures how much of a preference signal is length and style.

Arithmetic is in float64; scores and lengths are finite.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from callbacks.measures.preferences import logistic_regression
from modules.functional.advantages import group_center
from modules.functional.diagnostics import ece, pearson, within_group_correlation
from modules.types import ScoredPair

STYLE_RIDGE = 1e-3  # weight of the ridge beside the mean cross-entropy per pair
SIMILAR_LENGTH = 0.1  # largest difference in length, as a share of the longer completion
MAX_MARGINS = 8  # no accuracies by margin where the data have more different margins

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]+\S", re.MULTILINE)
HEADER = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
BOLD = re.compile(r"\*\*(?=[^\s*]).*?[^\s*]\*\*")


def spearman(x: Tensor, y: Tensor) -> float:
    """Return the rank correlation of ``x`` and ``y``, both [N], in [-1, 1]; 0 where either is constant.

    It is Pearson's correlation of the ranks. Ties get their mean rank.

    Raises:
        ValueError: ``x`` and ``y`` are not two vectors of one length.
    """
    return pearson(_ranks(x), _ranks(y))


def within_group_spearman(x: Tensor, y: Tensor, group: Tensor) -> float:
    """Return the rank correlation of ``x`` and ``y`` without each group's own mean, in [-1, 1].

    The means are subtracted first. The ranks are those of all N deviations together, so a pair far apart outranks one
    close together.

    Args:
        x: [N], finite.
        y: [N], finite.
        group: int [N], any numbers; equal = same group.

    Raises:
        ValueError: the arguments are not three vectors of one length.
    """
    return spearman(group_center(x.double(), group), group_center(y.double(), group))


def _ranks(x: Tensor) -> Tensor:
    """Return the ranks [N] of ``x`` [N]: 1 for the lowest, ties at their mean rank."""
    _, index, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[index]


def style_features(text: str) -> dict[str, float]:
    """Count what readers and judges are known to favour.

    ``length``: characters. ``list_items``: lines that begin with ``-``, ``*``, ``+``, ``1.`` or ``1)`` and a space.
    ``headers``: lines that begin with one to six ``#`` and a space. ``bold``: spans ``**...**`` within a line.
    """
    return {
        "length": len(text),
        "list_items": len(LIST_ITEM.findall(text)),
        "headers": len(HEADER.findall(text)),
        "bold": len(BOLD.findall(text)),
    }


def style_regression(differences: Tensor, outcome: Tensor) -> Tensor:
    """Return how much each feature moves a preference: a logit per root mean square of its difference.

    P(first preferred) = sigma(differences / rms @ coefficients). The fit minimises the mean cross-entropy + STYLE_RIDGE
    / 2 * sum of squared coefficients. A feature that never differs gets 0.

    There is no intercept and no mean is subtracted, so it does not matter which completion of a pair comes first: (d,
    o) and (-d, 1 - o) are the same row. All pairs may be given as chosen minus rejected with outcome 1.

    Args:
        differences: [N, F], N >= 1, feature of the first completion minus that of the second.
        outcome: [N], in [0, 1], 1 = the first is preferred, 0.5 = neither.

    Returns:
        [F], float64.
    """
    differences = differences.double()
    scale = differences.square().mean(0).sqrt()  # [F]
    standardized = differences / scale.masked_fill(scale == 0, 1.0)
    return logistic_regression(standardized, outcome, torch.full_like(scale, STYLE_RIDGE))


def brier(confidence: Tensor, correct: Tensor) -> float:
    """Return the mean squared difference of confidence and outcome, in [0, 1]; 0 for N = 0.

    A confidence of 1/2 throughout scores 0.25.

    Args:
        confidence: [N], in [0, 1].
        correct: [N], bool or in [0, 1].
    """
    return (confidence.double() - correct.double()).square().sum().item() / max(len(confidence), 1)


def preference_calibration(chosen_score: Tensor, rejected_score: Tensor) -> tuple[float, float]:
    """Return (ECE, Brier score) of sigma(score difference), read as the probability that the higher score is better.

    The confidence is sigma(abs(d)) with d = chosen - rejected, in [0.5, 1]. It is right where d > 0 and half right
    where d = 0.

    Args:
        chosen_score: [N], scores of the completions that the data prefer.
        rejected_score: [N], scores of the others.
    """
    difference = chosen_score.double() - rejected_score.double()  # [N]
    confidence, correct = difference.abs().sigmoid(), _wins(difference)
    return ece(confidence, correct), brier(confidence, correct)


def _wins(difference: Tensor) -> Tensor:
    """Return 1 where ``difference`` [N] > 0, 0 where it is < 0, 0.5 for a tie; [N]."""
    return (difference.sign() + 1) / 2


def audit_report(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """Compute every measure of this file on N scored pairs, by name. Without pairs it returns only ``pairs`` = 0.

    A measure of an empty subset is absent. Lengths are tokens, except in style.

    - ``pairs``: N. ``margin``: mean of chosen - rejected score.
    - ``accuracy``: share of pairs whose chosen completion has the higher score, a tie counting half.
    - ``accuracy_chosen_shorter``, ``accuracy_chosen_longer``, ``accuracy_similar_length``: the same on pairs with such
      lengths; similar = within 10 % of the longer one.
    - ``accuracy_short_prompts``, ``accuracy_medium_prompts``, ``accuracy_long_prompts``: the same by terciles of the
      prompts' lengths. Equal lengths stay together.
    - ``accuracy_margin_<m>``: the same by the strength of preference in the data, if that takes at most MAX_MARGINS
      values.
    - ``longer_wins``: accuracy of the rule that the longer completion is better.
    - ``score_length_pearson``, ``score_length_spearman``: correlation of score and length over all completions, each
      counted once. ``..._within_prompt``: the same after each prompt's means are subtracted.
    - ``style/<feature>``: what moves the score's preference; ``data_style/<feature>``: what moves the data's. See
      ``style_regression``.
    - ``ece``, ``brier``: see ``preference_calibration``.
    """
    if not pairs:
        return {"pairs": 0.0}
    chosen, rejected = (
        _float64([pair.chosen_score for pair in pairs]),
        _float64([pair.rejected_score for pair in pairs]),
    )  # [N]
    longer = _float64([pair.chosen_length - pair.rejected_length for pair in pairs])  # [N]
    right = _wins(chosen - rejected)  # [N]
    calibration_error, brier_score = preference_calibration(chosen, rejected)
    return {
        "pairs": float(len(pairs)),
        "margin": (chosen - rejected).mean().item(),
        **{
            f"accuracy{name}": right[keep].mean().item() for name, keep in _subsets(pairs, longer).items() if keep.any()
        },
        "longer_wins": _wins(longer).mean().item(),
        **_length_correlations(pairs),
        **_style(pairs, right),
        "ece": calibration_error,
        "brier": brier_score,
    }


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _subsets(pairs: Sequence[ScoredPair], longer: Tensor) -> dict[str, Tensor]:
    """Return the pairs behind each accuracy, as bool [N] by the end of the accuracy's name.

    ``longer``: [N], tokens of the chosen completion minus those of the rejected one.
    """
    longest = _float64([max(pair.chosen_length, pair.rejected_length) for pair in pairs])
    prompts = _float64([pair.prompt_length for pair in pairs])
    ordered, last = prompts.sort().values, len(pairs) - 1
    first_third, second_third = ordered[last // 3], ordered[2 * last // 3]
    margins = ["" if pair.margin is None else f"_margin_{pair.margin:g}" for pair in pairs]
    strengths = sorted(set(margins) - {""})
    return {
        "": torch.ones_like(longer, dtype=torch.bool),
        "_chosen_shorter": longer < 0,
        "_chosen_longer": longer > 0,
        "_similar_length": longer.abs() <= SIMILAR_LENGTH * longest,
        "_short_prompts": prompts <= first_third,
        "_medium_prompts": (prompts > first_third) & (prompts <= second_third),
        "_long_prompts": prompts > second_third,
        **{
            name: torch.tensor([name == margin for margin in margins])
            for name in strengths
            if len(strengths) <= MAX_MARGINS
        },
    }


def _length_correlations(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """Correlate score and length over the completions. Each counts once, however many pairs it is in."""
    sides = [
        side
        for pair in pairs
        for side in (
            (pair.prompt, pair.chosen, pair.chosen_length, pair.chosen_score),
            (pair.prompt, pair.rejected, pair.rejected_length, pair.rejected_score),
        )
    ]
    prompts, _, lengths, scores = zip(*dict.fromkeys(sides), strict=True)
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    length, score = _float64(lengths), _float64(scores)
    group = torch.tensor([number[prompt] for prompt in prompts])
    return {
        "score_length_pearson": pearson(score, length),
        "score_length_spearman": spearman(score, length),
        "score_length_pearson_within_prompt": within_group_correlation(score, length, group),
        "score_length_spearman_within_prompt": within_group_spearman(score, length, group),
    }


def _style(pairs: Sequence[ScoredPair], right: Tensor) -> dict[str, float]:
    """Return the style coefficients of the score's preference (``right`` [N]) and of the data's."""
    features = [(style_features(pair.chosen), style_features(pair.rejected)) for pair in pairs]
    names = list(features[0][0])
    differences = torch.stack(
        [_float64([chosen[name] - rejected[name] for chosen, rejected in features]) for name in names], dim=1
    )  # [N, F]
    return {
        f"{prefix}/{name}": value
        for prefix, outcome in (("style", right), ("data_style", torch.ones_like(right)))
        for name, value in zip(names, style_regression(differences, outcome).tolist(), strict=True)
    }

"""What a preference signal owes to length and style. Arithmetic in float64; scores and lengths are finite."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from callbacks.measures.preferences import logistic_regression
from modules.functional.advantages import group_center
from modules.functional.diagnostics import ece, pearson, within_group_correlation
from modules.types import ScoredPair

STYLE_RIDGE = 1e-3  # of the mean cross-entropy per pair
SIMILAR_LENGTH = 0.1  # of the longer completion
MAX_MARGINS = 8  # different strengths of preference that get an accuracy each

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]+\S", re.MULTILINE)
HEADER = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
BOLD = re.compile(r"\*\*(?=[^\s*]).*?[^\s*]\*\*")


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of ``x`` and ``y``, both [N], in [-1, 1]: Pearson's of the ranks, ties at their mean rank; 0
    where either is constant.

    Raises:
        ValueError: not two vectors of one length.
    """
    return pearson(_ranks(x), _ranks(y))


def within_group_spearman(x: Tensor, y: Tensor, group: Tensor) -> float:
    """Spearman's correlation of ``x`` and ``y`` after each group's own mean is taken off both, in [-1, 1].

    The means go first and the ranks are those of all N deviations together: a pair far apart outranks one close
    together.

    Args:
        x: [N], finite.
        y: [N], finite.
        group: int [N], any numbers; equal = same group.

    Raises:
        ValueError: not three vectors of one length.
    """
    return spearman(group_center(x.double(), group), group_center(y.double(), group))


def _ranks(x: Tensor) -> Tensor:
    """1 for the lowest of ``x`` [N], ties at their mean rank. Returns [N]."""
    _, index, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[index]


def style_features(text: str) -> dict[str, float]:
    """Counts of what readers and judges are known to favour, [] each.

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
    """Logits by which each feature moves a preference, per root mean square of its difference; 0 for a feature that
    never differs.

    P(first preferred) = sigma(differences / rms @ coefficients), by cross-entropy with STYLE_RIDGE / 2 times the sum of
    squares added to the mean. There is no intercept and no mean is taken off, so that it does not matter which
    completion of a pair is put first: (d, o) and (-d, 1 - o) are the same row, and all pairs may be given as chosen
    minus rejected with outcome 1.

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
    """Mean squared distance of confidence and outcome, in [0, 1]; 0 for N = 0. A confidence of 1/2 throughout scores
    0.25.

    confidence: [N], in [0, 1]. correct: [N], bool or in [0, 1].
    """
    return (confidence.double() - correct.double()).square().sum().item() / max(len(confidence), 1)


def preference_calibration(chosen_score: Tensor, rejected_score: Tensor) -> tuple[float, float]:
    """(ECE, Brier score) of sigma(score difference) as the probability that the higher score is the better completion.

    chosen_score, rejected_score: [N], the first of what the data prefer. The confidence is sigma(abs(d)), in [0.5, 1];
    it is right where d = chosen - rejected > 0, half right for d = 0.
    """
    difference = chosen_score.double() - rejected_score.double()  # [N]
    confidence, correct = difference.abs().sigmoid(), _wins(difference)
    return ece(confidence, correct), brier(confidence, correct)


def _wins(difference: Tensor) -> Tensor:
    """1 where ``difference`` [N] > 0, 0 where it is < 0, 0.5 for a tie. Returns [N]."""
    return (difference.sign() + 1) / 2


def audit_report(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """Every measure of this file on N scored pairs, each a number [] by name; without pairs only ``pairs`` = 0.

    A measure of a subset is absent where the subset is empty. Lengths are tokens, except in style.

    - ``pairs`` N; ``margin`` mean of chosen - rejected score
    - ``accuracy`` share of pairs whose chosen completion has the higher score, a tie counting half;
      ``accuracy_chosen_shorter``, ``accuracy_chosen_longer`` and ``accuracy_similar_length`` (within 10 % of the
      longer) where the lengths are so; ``accuracy_short_prompts``, ``_medium_``, ``_long_`` by terciles of the prompts'
      lengths, equal lengths staying together; ``accuracy_margin_<m>`` by the data's strength of preference, if that
      takes at most MAX_MARGINS values
    - ``longer_wins`` accuracy of the rule that the longer completion is better
    - ``score_length_pearson`` and ``_spearman`` over all completions, each once, and ``..._within_prompt`` after
      prompts' means are taken off
    - ``style/<feature>`` what moves the score's preference, ``data_style/<feature>`` the data's (see
      ``style_regression``)
    - ``ece``, ``brier`` see ``preference_calibration``
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
    """Which pairs each accuracy is taken over, bool [N] by the end of its name. longer: [N], tokens of chosen -
    rejected.
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
    """Correlations of score and length over the completions, each once however many pairs it is in."""
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
    """Coefficients of the score's preference (``right`` [N]) and of the data's."""
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

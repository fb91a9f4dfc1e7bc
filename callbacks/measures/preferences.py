"""Win rates: how often a model's answers are preferred to a baseline's, as counted and at equal length.

A preference is 1 where the model's answer wins, 0 where the baseline's wins, 0.5 for a tie. Values between are soft
votes. Arithmetic is in float64.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Ridges of the fit below. They keep theta finite for a model that always wins, and phi where length decides alone.
THETA_RIDGE, PHI_RIDGE = 1e-6, 1e-4


def win_rate(preference: Tensor) -> float:
    """Return the mean preference in percent, 0 to 100.

    Args:
        preference: [N], N >= 1, in [0, 1].

    Raises:
        ValueError: ``preference`` is empty, has another shape or is outside [0, 1].
    """
    return 100.0 * _check_preferences(preference).mean().item()


def win_rate_standard_error(preference: Tensor) -> float:
    """Return the standard error of ``win_rate`` in percent: 100 * sample std (ddof=1) / sqrt(N).

    For N = 1 it is 50, the largest possible value.

    Args:
        preference: [N], N >= 1, in [0, 1].

    Raises:
        ValueError: ``preference`` is empty, has another shape or is outside [0, 1].
    """
    values = _check_preferences(preference)
    return 100.0 * (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 50.0


def length_controlled_win_rate(preference: Tensor, model_lengths: Tensor, baseline_lengths: Tensor) -> float:
    """Return the win rate in percent that the model would have if its answers were as long as the baseline's.

    Fits logit P(win) = theta + phi tanh(d / std(d)), with d = model length - baseline length and ddof=1, and returns
    100 sigma(theta). The loss is the mean cross-entropy + THETA_RIDGE / 2 * theta^2 + PHI_RIDGE / 2 * phi^2. Where d
    does not vary, the length term is 0 and the result is the raw win rate.

    Source: AlpacaEval 2 (2404.04475). Two things differ. The instruction difficulties are left out, because they need
    the answers of many models. A ridge replaces the paper's penalty.

    Args:
        preference: [N], N >= 1, in [0, 1].
        model_lengths: [N], characters.
        baseline_lengths: [N], characters.

    Raises:
        ValueError: the shapes differ, or ``preference`` is empty or outside [0, 1].
    """
    outcome = _check_preferences(preference)
    if model_lengths.shape != outcome.shape or baseline_lengths.shape != outcome.shape:
        shapes = [tuple(x.shape) for x in (preference, model_lengths, baseline_lengths)]
        raise ValueError(
            f"length_controlled_win_rate: shapes are {shapes}, expected [N] each; give two lengths per preference."
        )
    difference = model_lengths.double() - baseline_lengths.double()  # [N]
    std = difference.std().item() if len(difference) > 1 else 0.0
    term = (difference / std).tanh() if std > 0 else torch.zeros_like(difference)
    features = torch.stack([torch.ones_like(term), term], dim=1)  # [N, 2]
    theta, _ = logistic_regression(features, outcome, features.new_tensor([THETA_RIDGE, PHI_RIDGE]))
    return 100.0 * theta.sigmoid().item()


def _check_preferences(preference: Tensor) -> Tensor:
    """Return the preferences in float64 [N]. Raises ValueError when there are none or one is outside [0, 1]."""
    if preference.dim() != 1 or len(preference) == 0 or not bool(((preference >= 0) & (preference <= 1)).all()):
        raise ValueError(
            f"A win rate needs at least one preference, shape [N], in [0, 1]; got shape {tuple(preference.shape)}: "
            "leave out what has no score."
        )
    return preference.double()


def logistic_regression(features: Tensor, outcome: Tensor, ridge: Tensor) -> Tensor:
    """Return the weights w [F] of a logistic regression with a ridge.

    They minimise the mean over rows of the cross-entropy of sigma(features w) with the outcome, plus the sum of ridge /
    2 * w^2. Newton's method with step halving, in float64.

    Args:
        features: [N, F], with a column of ones if an intercept is wanted.
        outcome: [N], in [0, 1]. A value p between counts as two rows, 1 with weight p and 0 with weight 1 - p.
        ridge: [F], > 0. It makes the minimum unique and finite, on separable data too.
    """
    features, outcome, ridge = features.double(), outcome.double(), ridge.double()
    rows = len(features)

    def loss(weights: Tensor) -> Tensor:
        """Return the loss [] at weights [F]."""
        logits = features @ weights  # [N]
        return (softplus(logits) - outcome * logits).mean() + (ridge * weights.square()).sum() / 2

    weights = torch.zeros_like(ridge)
    for _ in range(100):
        probability = (features @ weights).sigmoid()  # [N]
        gradient = features.T @ (probability - outcome) / rows + ridge * weights
        curvature = probability * (1 - probability)
        hessian = features.T @ (curvature[:, None] * features) / rows + ridge.diag()  # [F, F]
        step = torch.linalg.solve(hessian, gradient)
        expected = gradient @ step  # about twice the decrease of a full step
        while loss(weights - step) > loss(weights) - 1e-4 * gradient @ step + 1e-12:  # the last term is rounding
            step = step / 2
        weights = weights - step
        if expected < 1e-18:
            break
    return weights

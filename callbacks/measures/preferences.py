"""How often a model's answers are preferred to a baseline's, as counted and at equal length. Arithmetic in float64.

A preference is 1 where the model's answer wins, 0 where the baseline's does, 0.5 for a tie; values between are soft
votes.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

THETA_RIDGE, PHI_RIDGE = (
    1e-6,
    1e-4,
)  # beside the mean cross-entropy; they keep theta finite for a model that always wins, phi where length decides


def win_rate(preference: Tensor) -> float:
    """Mean preference in percent, 0..100.

    preference: [N], N >= 1, in [0, 1]. Raises ValueError for anything else.
    """
    return 100.0 * _check_preferences(preference).mean().item()


def win_rate_standard_error(preference: Tensor) -> float:
    """Standard error of ``win_rate`` in percent: 100 * sample std (ddof=1) / sqrt(N); 50, the most it can be, for N =
    1.

    preference: [N], N >= 1, in [0, 1]. Raises ValueError for anything else.
    """
    values = _check_preferences(preference)
    return 100.0 * (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 50.0


def length_controlled_win_rate(preference: Tensor, model_lengths: Tensor, baseline_lengths: Tensor) -> float:
    """Win rate in percent, 0..100, that the model would have if its answers were as long as the baseline's.

    logit P(win) = theta + phi tanh(d / std(d)), d = model length - baseline length, std with ddof=1; the result is 100
    sigma(theta). Fitted by cross-entropy with a ridge: theta^2 and phi^2, times half of THETA_RIDGE and PHI_RIDGE, are
    added to the mean. Where d does not vary, the term is 0 and the result is the raw win rate. Source: AlpacaEval 2
    (2404.04475) without the instruction difficulties, which need the answers of many models, and with a ridge in place
    of its penalty.

    preference: [N], N >= 1, in [0, 1]. model_lengths, baseline_lengths: [N], characters. Raises ValueError for anything
    else.
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
    """The preferences in float64 [N]; ValueError unless there are some and all are in [0, 1]."""
    if preference.dim() != 1 or len(preference) == 0 or not bool(((preference >= 0) & (preference <= 1)).all()):
        raise ValueError(
            f"A win rate needs preferences [N] in [0, 1], at least one, got shape {tuple(preference.shape)}: leave out "
            "what has no score."
        )
    return preference.double()


def logistic_regression(features: Tensor, outcome: Tensor, ridge: Tensor) -> Tensor:
    """Weights w [F] that minimise mean over rows of the cross-entropy of sigma(features w) with outcome, + sum of ridge
    / 2 * w^2.

    features: [N, F], with a column of ones if an intercept is wanted. outcome: [N], in [0, 1]; a value between is two
    rows weighted p and 1 - p.
    ridge: [F], > 0, which makes the minimum unique and finite on separable data too. Newton's method with step halving,
    in float64.
    """
    features, outcome, ridge = features.double(), outcome.double(), ridge.double()
    rows = len(features)

    def loss(weights: Tensor) -> Tensor:
        """[] at weights [F]."""
        logits = features @ weights  # [N]
        return (softplus(logits) - outcome * logits).mean() + (ridge * weights.square()).sum() / 2

    weights = torch.zeros_like(ridge)
    for _ in range(100):
        probability = (features @ weights).sigmoid()  # [N]
        gradient = features.T @ (probability - outcome) / rows + ridge * weights
        curvature = probability * (1 - probability)
        hessian = features.T @ (curvature[:, None] * features) / rows + ridge.diag()  # [F, F]
        step = torch.linalg.solve(hessian, gradient)
        expected = gradient @ step  # about twice what a full step gains
        while loss(weights - step) > loss(weights) - 1e-4 * gradient @ step + 1e-12:  # the last term is rounding
            step = step / 2
        weights = weights - step
        if expected < 1e-18:
            break
    return weights

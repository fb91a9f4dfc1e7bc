"""From one score per completion to one reward per token."""

import torch
from torch import Tensor


def penalize_missing_eos(scores: Tensor, stopped: Tensor, penalty: float, replace: bool) -> Tensor:
    """Lower the scores of completions that were cut off: ``score - penalty``, or ``-penalty`` with replace.

    scores: [N]; NaN (unscorable) stays NaN. stopped: bool [N], True where the completion ended by itself. penalty: >=
    0, in units of the score. Returns [N]. Replacing improves a score below -penalty, so it needs a penalty below nearly
    all scores; subtracting never improves one. Raises ValueError for penalty < 0. Source: Ziegler et al. 2019
    (1909.08593), whose released code replaces by -1.
    """
    if not penalty >= 0:
        raise ValueError(
            f"penalize_missing_eos: penalty is {penalty}, expected >= 0; it is taken off the score, so give it without "
            "its sign."
        )
    lowered = (
        torch.full_like(scores, -penalty).masked_fill(scores.isnan(), float("nan")) if replace else scores - penalty
    )
    return torch.where(stopped, scores, lowered)


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """-penalty at every kept token, plus the score at the last kept token of each row; 0 at dropped columns.

    scores: [N]; NaN stays NaN at that one token. penalties: [N, T], beta times the log-ratio to the reference (``k1``),
    in units of the
    score. mask: bool [N, T], gaps and padding on either side allowed; a row that keeps nothing gets zeros, whatever its
    score.
    Returns [N, T]. Source: Ziegler et al. 2019 (1909.08593, section 2.1); InstructGPT (2203.02155, eq. 2).
    """
    kept_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (kept_from_here == 1)
    return torch.where(last, scores[:, None], 0.0) - penalties.masked_fill(~mask, 0.0)

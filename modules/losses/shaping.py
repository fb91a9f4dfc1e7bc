"""Makes one reward per token from one score per completion, by the settings of PPO."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.functional import kl
from modules.functional.ranges import check_numbers


@dataclass(frozen=True)
class AdaptiveKL:
    """Changes the KL's weight after each phase so that the KL per completion stays at ``target``.

    weight <- weight (1 + gain clip(KL / target - 1, -0.2, 0.2)), where the KL is the mean over completions of the
    summed ``k1`` (Ziegler et al., arXiv 1909.08593, section 2.2). The gain is 0.1 in the paper, completions / 10000 in
    its code.

    Raises:
        ValueError: a value is out of range.
    """

    target: float = 6.0  # > 0, nats per completion
    gain: float | None = 0.1  # > 0 per phase; None = completions of the phase / horizon
    horizon: int = 10_000  # >= 1, completions

    def __post_init__(self) -> None:
        check_numbers(
            "adaptive KL",
            target=(self.target, "(0, inf)"),
            gain=(self.gain, "(0, inf)"),
            horizon=(self.horizon, "[1, inf)"),
        )

    def __call__(self, coef: float, kl: float, completions: int) -> float:
        """Compute the next weight from the current one, the phase's ``kl`` (nats per completion) and its completions.

        A NaN ``kl`` gives NaN.
        """
        gain = completions / self.horizon if self.gain is None else self.gain
        return coef * (1 + gain * min(max(kl / self.target - 1, -0.2), 0.2))


@dataclass(frozen=True)
class KL:
    """The KL that ties PPO's policy to a frozen reference. TRL: ``kl_coef``, ``kl_estimator``, ``ref_model``.

    Raises:
        ValueError: a value is out of range, or values do not go together.
    """

    coef: float = 0.05  # >= 0, weight per nat; the first weight if it is adaptive
    adaptive: AdaptiveKL | None = None  # holds the KL at a target
    # None = the KL is part of the reward, as k1 without gradient; weighted_k3 or k2 = it is part of the loss
    loss: Callable[..., Any] | None = None
    reference: str | None = None  # None = the policy as it starts; a folder or hub id = another model

    def __post_init__(self) -> None:
        check_numbers("kl", coef=(self.coef, "[0, inf)"))
        if self.adaptive is not None and self.coef == 0:
            raise ValueError("kl: adaptive multiplies coef, and 0 stays 0: start above it")
        if self.loss is kl.k1:
            raise ValueError("kl: k1 as a loss has no gradient on average; use weighted_k3 or k2")


@dataclass(frozen=True)
class MissingEos:
    """Lowers the score of completions that did not end by themselves. TRL: ``missing_eos_penalty``.

    Replacing raises a score below -penalty, so choose a -penalty below nearly all scores. Subtracting never raises one.
    Source: Ziegler et al., arXiv 1909.08593, whose code replaces by -1.

    Raises:
        ValueError: a penalty below 0; it is subtracted, so it has no sign.
    """

    penalty: float = 1.0  # >= 0, in units of the score
    replace: bool = False  # False: score - penalty; True: -penalty, whatever the score was

    def __post_init__(self) -> None:
        check_numbers("missing_eos", penalty=(self.penalty, "[0, inf)"))

    def __call__(self, scores: Tensor, stopped: Tensor) -> Tensor:
        """Lower the scores [N] of completions that did not end.

        scores: [N]; NaN (unscorable) stays NaN. stopped: bool [N], True = the completion ended by itself.
        """
        if self.replace:
            lowered = torch.full_like(scores, -self.penalty).masked_fill(scores.isnan(), float("nan"))
        else:
            lowered = scores - self.penalty
        return torch.where(stopped, scores, lowered)


@dataclass(frozen=True)
class Incentives:
    """What PPO asks of the policy beside the reward; nothing by default. TRL: ``missing_eos_penalty``.

    Raises:
        ValueError: a value is out of range.
    """

    missing_eos: MissingEos | None = None  # to end: what a completion that did not loses of its score
    entropy: float = 0.0  # to stay various: weight of the entropy in the objective, per nat
    # >= 0, not to forget: weight of the log-likelihood per token of the texts in data.ptx (PPO-ptx; InstructGPT's 27.8
    # is for a sum that it does not define)
    ptx: float = 0.0

    def __post_init__(self) -> None:
        check_numbers("incentives", entropy=(self.entropy, "(-inf, inf)"), ptx=(self.ptx, "[0, inf)"))


@dataclass(frozen=True)
class GAE:
    """How PPO makes advantages from token rewards; see ``gae``. TRL: ``gamma``, ``lam``, ``whiten_rewards``.

    Raises:
        ValueError: a value is out of range.
    """

    gamma: float = 1.0  # [0, 1], discount per token
    lam: float = 0.95  # [0, 1]; 1 is advised for long chains of thought (DeepSeek-R1, 2501.12948, supplement A.3)
    # Divide token rewards by their standard deviation over the phase; their mean stays. Values are then in those units.
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        check_numbers("gae", gamma=(self.gamma, "[0, 1]"), lam=(self.lam, "[0, 1]"))


def make_token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Put -penalty on every kept token, and the score on the last kept token of each row.

    scores: [N]; NaN stays NaN at that one token. penalties: [N, Tc], the KL's weight times the log-ratio to the
    reference (``k1``), in units of the score. mask: bool [N, Tc], with gaps and padding anywhere; an empty row gets
    zeros, whatever its score. Returns [N, Tc], 0 at dropped columns. Source: Ziegler et al. 2019 (1909.08593, section
    2.1); InstructGPT (2203.02155, eq. 2).
    """
    kept_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (kept_from_here == 1)
    return torch.where(last, scores[:, None], 0.0) - penalties.masked_fill(~mask, 0.0)

"""Choices of on-policy methods: how rewards become advantages, how token losses are averaged, which loss is taken."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.functional.advantages import group_center, group_zscore, leave_one_out
from modules.functional.kl import adaptive_kl_coef
from modules.losses.policy_loss import clipped_policy_loss
from modules.types import PolicyBatch


class Advantage(ABC):
    """Turns the rewards of a phase into one advantage per completion; NaN rewards (unscorable) give 0."""

    @abstractmethod
    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Advantages [N] from rewards [N] and group labels int [N]."""


class GroupZScore(Advantage):
    """(r - mean of the group) / (sample std of the group + eps): GRPO, arXiv 2402.03300 section 4.1.2."""

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = eps

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        return group_zscore(rewards, group, self.eps)


class GroupCenter(Advantage):
    """r - mean of the group: Dr. GRPO, arXiv 2503.20783 (dividing by the std favours very easy and very hard prompts)."""

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        return group_center(rewards, group)


class LeaveOneOut(Advantage):
    """r - mean of the other completions of the group: RLOO, arXiv 2402.14740; unbiased."""

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        return leave_one_out(rewards, group)


class Aggregation(ABC):
    """How token losses become one number: weighted sum over all rows of an optimiser step, divided by the sum of
    ``row_count``.
    """

    @abstractmethod
    def row_count(self, mask: Tensor) -> Tensor:
        """What each row adds to the denominator, [N], from the keep-mask [N, Tc]."""

    def weights(self, mask: Tensor) -> Tensor:
        """Weight of each token loss, [N, Tc], zero where the mask is False."""
        return mask.float()


class TokenMean(Aggregation):
    """Every token of the step counts the same (DAPO, arXiv 2503.14476)."""

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.sum(1).float()


class SequenceMean(Aggregation):
    """Mean over completions of their mean token loss (GRPO as published; short completions weigh more per token)."""

    def row_count(self, mask: Tensor) -> Tensor:
        return torch.ones(len(mask), device=mask.device)

    def weights(self, mask: Tensor) -> Tensor:
        return mask / mask.sum(1, keepdim=True).clamp(min=1)


class ConstantNorm(Aggregation):
    """Sum over tokens divided by (completions x max_length), a constant: no length bias (Dr. GRPO, arXiv 2503.20783).

    Args:
        max_length: the completion budget in tokens.
    """

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"ConstantNorm max_length must be at least 1 token, got {max_length}")
        self.max_length = max_length

    def row_count(self, mask: Tensor) -> Tensor:
        return torch.full((len(mask),), float(self.max_length), device=mask.device)


class PolicyObjective(ABC):
    """A policy loss on a micro-batch of completions."""

    aggregation: Aggregation

    @abstractmethod
    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [] and its metrics from ``logprobs`` [N, Tc] (with gradient) and the batch."""


class Clipped(PolicyObjective):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A): PPO, arXiv 1707.06347 eq. 7, with DAPO's higher upper
    bound.

    Args:
        clip_low: >= 0.
        clip_high: >= 0; 0.28 in DAPO, which leaves unlikely tokens more room to grow.
        aggregation: default ``TokenMean``.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28, aggregation: Aggregation | None = None) -> None:
        if min(clip_low, clip_high) < 0:
            raise ValueError(f"clip_low and clip_high must be >= 0, got {clip_low} and {clip_high}")
        self.clip_low, self.clip_high = clip_low, clip_high
        self.aggregation = aggregation or TokenMean()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.aggregation.weights(batch["completion_mask"])
        return clipped_policy_loss(
            logprobs,
            batch["old_logprobs"],
            batch["advantages"],
            weights,
            batch["denominator"],
            self.clip_low,
            self.clip_high,
        )


@dataclass(frozen=True)
class AdaptiveKL:
    """Moves the KL's weight after each phase so that the KL per completion stays at ``target`` (Ziegler et al., arXiv
    1909.08593, section 2.2).

    weight <- weight (1 + gain clip(KL / target - 1, -0.2, 0.2)); gain 0.1 in the paper, completions / 10000 in its
    released code.

    Raises:
        ValueError: values out of range.
    """

    target: float = 6.0  # > 0, nats per completion
    gain: float | None = 0.1  # > 0 per phase; None = completions of the phase / horizon
    horizon: int = 10_000  # completions

    def __post_init__(self) -> None:
        if self.target <= 0 or self.horizon < 1 or (self.gain is not None and self.gain <= 0):
            raise ValueError(
                f"adaptive_kl: target, gain and horizon must be > 0, got {self.target}, {self.gain} and {self.horizon}"
            )

    def __call__(self, coef: float, kl: float, completions: int) -> float:
        """The next weight, from this one, the ``kl`` of a phase (nats per completion) and its number of
        ``completions``.
        """
        return adaptive_kl_coef(coef, kl, self.target, completions / self.horizon if self.gain is None else self.gain)

"""Advantages: how much better a completion did than others, which a YAML names by class.

An advantage is made once per phase, from the scores of all its completions. A completion without a score enters no
statistic and has advantage 0. So has every completion of a group whose scores are all equal, before any whitening.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from modules.functional.advantages import group_center, group_zscore, leave_one_out
from modules.functional.ranges import check_numbers
from modules.rewards.combined import WeightedSum
from modules.trainer.ranks import whiten_over_ranks
from modules.types import PolicyBatch, Reward


class Advantage(ABC):
    """Makes the advantages of a phase from its rewards.

    Attributes:
        least_generations: completions of a prompt that it needs.
        takes_kl: whether it takes a KL in the reward into account.
        reads_logprobs: whether it reads ``old_logprobs`` of the batch. If not, a phase of one update need not compute
            them beforehand.
    """

    least_generations = 2
    takes_kl = True
    reads_logprobs = True

    def check(self, reward: Reward) -> None:  # noqa: B027
        """Refuse a reward that this advantage cannot use; by default none."""

    @abstractmethod
    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Compute advantages [N] or [N, Tc] from the batch of a whole phase of this rank (may be collective)."""


class ZScore(Advantage):
    """(reward - mean of its group) / (std of its group + eps): GRPO, arXiv 2402.03300, section 4.1.2.

    The paper leaves ddof and eps open. Dividing by std weighs very easy and very hard prompts up (Dr. GRPO, arXiv
    2503.20783, section 3.1).

    Args:
        ddof: 1 = the sample's standard deviation, as TRL, verl and OpenRLHF; 0 = the population's, as open-instruct.
        eps: >= 0, in units of the reward.
    """

    reads_logprobs = False

    def __init__(self, ddof: int = 1, eps: float = 1e-4) -> None:
        check_numbers("ZScore", ddof=(ddof, "[0, 1]"), eps=(eps, "[0, inf)"))
        self.ddof, self.eps = ddof, eps

    def __call__(self, batch: PolicyBatch) -> Tensor:
        return group_zscore(find_returns(batch), batch["group"], self.eps, self.ddof)


class Centered(Advantage):
    """reward - mean of its group: Dr. GRPO, arXiv 2503.20783."""

    reads_logprobs = False

    def __call__(self, batch: PolicyBatch) -> Tensor:
        return group_center(find_returns(batch), batch["group"])


class LeaveOneOut(Advantage):
    """reward - mean of the other rewards of its group, an unbiased baseline: RLOO, arXiv 2402.14740."""

    reads_logprobs = False

    def __call__(self, batch: PolicyBatch) -> Tensor:
        return leave_one_out(find_returns(batch), batch["group"])


class MaxRL(Advantage):
    """(reward - mean of its group) / mean of its group: MaxRL, arXiv 2602.02710, for rewards that are 0 or 1.

    Its gradient is that of log pass@1 up to order G, so prompts that are seldom solved weigh more. A group without a
    right answer teaches nothing. When called, a reward below 0 raises ValueError.
    """

    takes_kl = reads_logprobs = False

    def __call__(self, batch: PolicyBatch) -> Tensor:
        rewards, group = find_returns(batch), batch["group"]
        if bool((rewards < 0).any()):
            raise ValueError(
                f"MaxRL divides by the mean reward of a group, and a reward is "
                f"{float(rewards.nan_to_num(0).min()):.3g}: use a reward that is 0 or 1, such as ExactMatch"
            )
        centered = group_center(rewards, group)
        means = rewards.to(centered.dtype) - centered  # of a row with a score
        return torch.where(
            means > 0, centered / means.clamp(min=torch.finfo(means.dtype).tiny), torch.zeros_like(means)
        )


class Whitened(Advantage):
    """Whitens over all tokens of the phase, on all ranks: REINFORCE++, arXiv 2501.03262, eqs. 8-10.

    The return of a token is its completion's reward, minus the KL from this token on where the KL is part of the reward
    (``kl_loss: null``). Long completions weigh more in mean and deviation, because these are over tokens.

    Args:
        baseline: first subtract the mean reward of the group (REINFORCE++-baseline); then a KL belongs in the loss, as
            ``kl_loss: k2``.
    """

    reads_logprobs = False

    def __init__(self, baseline: bool = False) -> None:
        self.baseline, self.least_generations = baseline, 2 if baseline else 1

    def __call__(self, batch: PolicyBatch) -> Tensor:
        mask = batch["completion_mask"] & ~batch["rewards"].isnan()[:, None]
        if self.baseline:
            returns = group_center(find_returns(batch), batch["group"])[:, None].expand(mask.shape)
        else:
            returns = batch["rewards"][:, None].expand(mask.shape)
            if "penalties" in batch:
                penalties = batch["penalties"].masked_fill(~mask, 0.0)
                returns = returns - penalties.flip(1).cumsum(1).flip(1)
        whole = torch.zeros_like(batch["prompt_index"])
        return whiten_over_ranks(returns.masked_fill(~mask, 0.0), mask, whole, 1)


class GDPO(Advantage):
    """Normalises each part of a ``WeightedSum`` in its group, adds them by weight, and whitens over the phase.

    So a part with a small spread is not drowned by another part. The last whitening is over the completions of all
    ranks. Source: arXiv 2601.05242, section 3.

    Args:
        ddof: 1 = the sample's standard deviation; 0 = the population's.
        eps: >= 0, in units of each part.
    """

    takes_kl = reads_logprobs = False

    def __init__(self, ddof: int = 1, eps: float = 1e-4) -> None:
        check_numbers("GDPO", ddof=(ddof, "[0, 1]"), eps=(eps, "[0, inf)"))
        self.ddof, self.eps = ddof, eps

    def check(self, reward: Reward) -> None:
        """Refuse a reward that is no sum."""
        if not isinstance(reward, WeightedSum):
            raise ValueError(
                f"advantage GDPO normalises the parts of a WeightedSum, and the reward is {type(reward).__name__}: "
                "name WeightedSum as model.reward, or another advantage"
            )

    def __call__(self, batch: PolicyBatch) -> Tensor:
        scored = ~batch["rewards"].isnan()
        parts = batch["parts"].masked_fill(~scored[:, None], torch.nan)  # [N, C]
        columns = [group_zscore(part, batch["group"], self.eps, self.ddof) for part in parts.unbind(1)]
        total = (torch.stack(columns, 1) * batch["part_weights"]).sum(1, keepdim=True)  # [N, 1]
        whole = torch.zeros_like(batch["prompt_index"])
        whitened = whiten_over_ranks(total, scored[:, None], whole, 1)
        return whitened.masked_fill(total == 0, 0.0)[:, 0]  # the mean is 0 but for rounding


class FunctionAdvantage(Advantage):
    """Calls a function: rewards [N] (NaN = unscorable), group int [N] -> advantages [N]."""

    reads_logprobs = False

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.function = function

    def __call__(self, batch: PolicyBatch) -> Tensor:
        rewards = find_returns(batch)
        found = self.function(rewards, batch["group"])
        if not isinstance(found, Tensor) or found.shape != rewards.shape:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"advantage {getattr(self.function, '__name__', 'function')} returned {got}, expected a tensor of "
                f"shape [{len(rewards)}], one number for each completion"
            )
        found = found.masked_fill(rewards.isnan(), 0.0)
        if not bool(found.isfinite().all()):
            raise ValueError(
                f"advantage {getattr(self.function, '__name__', 'function')} returned a number that is not finite for "
                "a completion with a score: leave completions without a score, whose reward is NaN, out of its means"
            )
        return found


Advantage.register(FunctionType)  # a configuration may then name a function wherever it may name an advantage


def as_advantage(advantage: Any) -> Advantage:
    """Turn a function of rewards [N] and group [N] into an advantage; return an advantage as it is."""
    if isinstance(advantage, FunctionType) or not isinstance(advantage, Advantage):
        return FunctionAdvantage(advantage)
    return advantage


def find_returns(batch: PolicyBatch) -> Tensor:
    """Return the rewards [N], minus the whole KL of the completion where it is part of the reward (2402.14740)."""
    if "penalties" not in batch:
        return batch["rewards"]
    return batch["rewards"] - batch["penalties"].masked_fill(~batch["completion_mask"], 0.0).sum(1)

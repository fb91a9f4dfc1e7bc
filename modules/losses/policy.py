"""Losses on sampled completions with advantages.

A loss is called with ``logprobs`` [N, Tc], the current log-probs of the sampled tokens, in nats and with gradient, and
with a micro-batch. It returns the micro-batch's share [] of the loss of the whole optimiser step, and metrics, which
are detached means [] over kept tokens. In the formulas A is the advantage and ratio = exp(logprobs - old_logprobs),
which is never clamped before the exponential. The metric ``approx_kl`` is the mean of ratio - 1 - log ratio, the k3
estimate of KL(old || now). Values in dropped columns never reach the loss, a metric or a gradient.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from modules.functional.advantages import group_center, group_zscore
from modules.functional.masked import aggregate, masked_mean
from modules.functional.ranges import check_numbers
from modules.types import PolicyBatch

Metrics = dict[str, Tensor]


class Aggregation(ABC):
    """Makes one number of token losses: their weighted sum over all rows of an optimiser step / sum of ``row_count``."""

    @abstractmethod
    def row_count(self, mask: Tensor) -> Tensor:
        """Return what each row adds to the denominator, [N], from the keep-mask [N, Tc]; 0 for an empty row."""

    def weights(self, mask: Tensor) -> Tensor:
        """Return the weight of each token loss, [N, Tc], zero where the mask is False."""
        return mask.float()


class TokenMean(Aggregation):
    """Every token of the step counts the same (DAPO, arXiv 2503.14476)."""

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.sum(1).float()


class SequenceMean(Aggregation):
    """Mean over completions of their mean token loss (GRPO as published; short completions weigh more per token)."""

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.any(1).float()

    def weights(self, mask: Tensor) -> Tensor:
        return mask / mask.sum(1, keepdim=True).clamp(min=1)


class ConstantNorm(Aggregation):
    """Sum over tokens / (completions x max_length), a constant, so that length has no bias (Dr. GRPO, arXiv 2503.20783).

    Args:
        max_length: the completion budget in tokens.
    """

    def __init__(self, max_length: int) -> None:
        check_numbers("ConstantNorm", max_length=(max_length, "[1, inf)"))
        self.max_length = max_length

    def row_count(self, mask: Tensor) -> Tensor:
        return mask.any(1) * float(self.max_length)


class PolicyObjective(ABC):
    """A policy loss on a micro-batch of completions.

    Attributes:
        aggregation: makes one number of its token losses, and of those of a KL beside it.
        needs_advantage: whether a completion with advantage 0 has no gradient, so that it need not be computed.
    """

    aggregation: Aggregation
    needs_advantage = True

    def make_advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Compute the default advantages [N] of a phase from rewards [N] and group int [N]."""
        return group_zscore(rewards, group)

    @abstractmethod
    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        """Compute the loss [] and its metrics from ``logprobs`` [N, Tc], which have a gradient, and the batch."""


class Clipped(PolicyObjective):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per token: PPO, arXiv 1707.06347 eq. 7.

    The default upper bound is DAPO's (arXiv 2503.14476), which leaves unlikely tokens more room to grow. Metrics:
    ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` and ``clip_ratio/region_mean``, the shares of tokens whose
    gradient clip_low, clip_high and either of them cuts; ``approx_kl``.

    Args:
        clip_low: >= 0.
        clip_high: >= 0.
        dual_clip: > 1 bounds the loss of a token with A < 0 by -dual_clip A (arXiv 1912.09729); None = unbounded.
        aggregation: default ``TokenMean``.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        dual_clip: float | None = None,
        aggregation: Aggregation | None = None,
    ) -> None:
        check_numbers(
            "Clipped",
            clip_low=(clip_low, "[0, inf)"),
            clip_high=(clip_high, "[0, inf)"),
            dual_clip=(dual_clip, "(1, inf)"),
        )
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.aggregation = aggregation or TokenMean()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        advantages = take_advantages(logprobs, batch)
        ratio = log_ratio.masked_fill(advantages == 0, 0.0).exp()  # an overflow times an advantage of 0 would be NaN
        losses = clip_losses(ratio, advantages, self.clip_low, self.clip_high)  # [N, Tc]
        if self.dual_clip is not None:
            losses = torch.where(advantages < 0, torch.minimum(losses, -self.dual_clip * advantages), losses)
        metrics = measure_clips(ratio, advantages, mask, self.clip_low, self.clip_high)
        loss = aggregate(losses, self.aggregation.weights(mask), batch["denominator"])
        return loss, metrics | {"approx_kl": measure_kl(log_ratio, mask)}


class GSPO(PolicyObjective):
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) per completion, s = exp(mean over its tokens of log ratio).

    The loss is the mean over completions, as published (arXiv 2507.18071). s is a geometric mean, so the bounds are
    some hundred times narrower than those of a token's ratio; 0.2 would hardly ever clip. The metrics are those of
    ``Clipped``, with ``clip_ratio/*`` over completions.

    Args:
        clip_low: >= 0.
        clip_high: >= 0.
    """

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4) -> None:
        check_numbers("GSPO", clip_low=(clip_low, "[0, inf)"), clip_high=(clip_high, "[0, inf)"))
        self.clip_low, self.clip_high, self.aggregation = clip_low, clip_high, SequenceMean()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        keep = mask.any(-1)  # [N]
        ratio = masked_mean(log_ratio, mask, dim=-1).exp()  # [N]
        advantages = masked_mean(take_advantages(logprobs, batch), mask, dim=-1)  # [N]
        losses = clip_losses(ratio, advantages, self.clip_low, self.clip_high)
        metrics = measure_clips(ratio, advantages, keep, self.clip_low, self.clip_high)
        loss = aggregate(losses, keep, batch["denominator"])
        return loss, metrics | {"approx_kl": measure_kl(log_ratio, mask)}


class CISPO(PolicyObjective):
    """-min(ratio, 1 + clip_high) A logprob per token, the capped ratio without gradient, so every token has a gradient.

    Source: MiniMax-M1, arXiv 2506.13585 eqs. 4-5. There is no lower bound, because the paper tunes only the upper one;
    it names no number. Metrics: ``cispo_clip_ratio``, the share of tokens whose ratio is capped, whatever the sign of
    A; ``approx_kl``.

    Args:
        clip_high: >= 0, on top of 1; the default caps the ratio at 5 (ScaleRL, arXiv 2510.13786; TRL's
            ``epsilon_high`` is the cap itself).
        aggregation: default ``TokenMean``.
    """

    def __init__(self, clip_high: float = 4.0, aggregation: Aggregation | None = None) -> None:
        check_numbers("CISPO", clip_high=(clip_high, "[0, inf)"))
        self.clip_high, self.aggregation = clip_high, aggregation or TokenMean()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        ratio = log_ratio.detach().exp()
        losses = -ratio.clamp(max=1 + self.clip_high) * take_advantages(logprobs, batch) * logprobs  # [N, Tc]
        loss = aggregate(losses, self.aggregation.weights(mask), batch["denominator"])
        capped = masked_mean(ratio > 1 + self.clip_high, mask)
        return loss, {"cispo_clip_ratio": capped, "approx_kl": measure_kl(log_ratio, mask)}


class MirrorDescent(PolicyObjective):
    """-(r - mean of the group's r) l + tau/2 (l - l_old)^2 per completion, l the sum of its log-probs; then the mean.

    Source: Kimi k1.5, arXiv 2501.12599, section 2.3.2, eq. 3, with the mean reward in place of tau log Z. The reference
    of the square is the policy that sampled the phase, so the square is 0 at a phase's first update. Unlike the paper,
    we keep the optimizer's moments from phase to phase. Metrics: ``approx_kl``.

    Args:
        tau: >= 0, strength of the tie to the sampling policy; the square grows like the length squared, so keep it
            small (the paper names no number).
    """

    needs_advantage = False

    def __init__(self, tau: float = 0.01) -> None:
        check_numbers("MirrorDescent", tau=(tau, "[0, inf)"))
        self.tau, self.aggregation = tau, ConstantNorm(1)  # sums over tokens, mean over completions

    def make_advantages(self, rewards: Tensor, group: Tensor) -> Tensor:
        return group_center(rewards, group)

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        # The advantage is the same at all tokens of a completion, so it may be multiplied before the sum.
        gains = (take_advantages(logprobs, batch) * logprobs.masked_fill(~mask, 0.0)).sum(-1)  # [N]
        losses = -gains + 0.5 * self.tau * log_ratio.sum(-1).square()
        loss = aggregate(losses, mask.any(-1), batch["denominator"])
        return loss, {"approx_kl": measure_kl(log_ratio, mask)}


@dataclass(frozen=True)
class Clip:
    """Bounds of PPO's update; None = no bound. TRL: ``cliprange``, ``cliprange_value``.

    Raises:
        ValueError: values out of range.
    """

    ratio: float = 0.2  # >= 0, of the probability ratio, see Clipped
    dual: float | None = None  # > 1, see Clipped
    value: float | None = 0.2  # > 0, of a value from the one at collection, see ClippedValue

    def __post_init__(self) -> None:
        check_numbers(
            "clip", ratio=(self.ratio, "[0, inf)"), dual=(self.dual, "(1, inf)"), value=(self.value, "(0, inf)")
        )


def leave_out_unscored(batch: PolicyBatch) -> PolicyBatch:
    """Drop all tokens of completions without a score from the batch's ``completion_mask``."""
    mask = batch["completion_mask"] & ~batch["rewards"].isnan()[:, None]
    return cast(PolicyBatch, {**batch, "completion_mask": mask})


def take_log_ratio(logprobs: Tensor, batch: PolicyBatch) -> Tensor:
    """Compute log(now / old) [N, Tc] from ``logprobs`` [N, Tc] and the batch, 0 at dropped columns.

    Dropped columns are filled before the subtraction and any exponential, or NaN would come back through the gradient.
    Raises ValueError for shapes that differ.
    """
    old, dropped = batch["old_logprobs"], ~batch["completion_mask"]
    if logprobs.shape != old.shape or logprobs.shape != dropped.shape:
        shapes = [tuple(x.shape) for x in (logprobs, old, dropped)]
        raise ValueError(f"logprobs, old_logprobs and completion_mask have shapes {shapes}, expected [N, Tc] each")
    return logprobs.masked_fill(dropped, 0.0) - old.masked_fill(dropped, 0.0)


def take_advantages(logprobs: Tensor, batch: PolicyBatch) -> Tensor:
    """Return the batch's advantages in the shape of ``logprobs`` [N, Tc], 0 at dropped columns.

    Raises ValueError for advantages [N], which would broadcast along the wrong axis if N == Tc.
    """
    advantages = batch["advantages"]
    if advantages.dim() != 2:
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}, expected [N, Tc]; give one per row as [N, 1]"
        )
    return advantages.expand_as(logprobs).masked_fill(~batch["completion_mask"], 0.0)


def clip_losses(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Compute -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), elementwise."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def measure_clips(ratio: Tensor, advantages: Tensor, keep: Tensor, clip_low: float, clip_high: float) -> Metrics:
    """Measure the shares of kept entries whose gradient the clip cuts: below, above, and either."""
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    flags = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    return {name: masked_mean(flag, keep) for name, flag in flags.items()}


def measure_kl(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean [] over kept tokens of ratio - 1 - log ratio, from log ratios [N, Tc]."""
    log_ratio = log_ratio.detach()
    return masked_mean(torch.expm1(log_ratio) - log_ratio, mask)


def measure_ratio(logprobs: Tensor, batch: PolicyBatch) -> Metrics:
    """Measure how far the ratio is from 1 over kept tokens.

    The metrics are ratio/mean, ratio/square (mean of (ratio - 1)^2) and ratio/deviation (mean of |ratio - 1|), each [],
    detached. Without kept tokens they are 1, 0, 0. Averaged over micro-batches, with the kept tokens as weights,
    ratio/square - (ratio/mean - 1)^2 is the variance of the ratio. logprobs: [N, Tc]. Raises ValueError for shapes that
    differ.
    """
    mask = batch["completion_mask"]
    excess = torch.expm1(take_log_ratio(logprobs.detach(), batch))
    means = {
        "mean": 1 + masked_mean(excess, mask),
        "square": masked_mean(excess.square(), mask),
        "deviation": masked_mean(excess.abs(), mask),
    }
    return {f"ratio/{name}": value for name, value in means.items()}

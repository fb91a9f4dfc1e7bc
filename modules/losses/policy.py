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

from modules.functional.masked import aggregate, masked_mean
from modules.functional.ranges import check_numbers
from modules.losses.advantage import Advantage, Centered, LeaveOneOut, Whitened, ZScore
from modules.losses.aggregation import Aggregation, SequenceMean, SequenceSum, TokenMean
from modules.types import PolicyBatch

Metrics = dict[str, Tensor]


class PolicyObjective(ABC):
    """A policy loss on a micro-batch of completions.

    Attributes:
        aggregation: makes one number of its token losses, and of those of a KL beside it.
        needs_advantage: whether a completion with advantage 0 has no gradient, so that it need not be computed.
        resets_optimizer: whether each phase begins with an optimizer without moments.
        corrects_sampler: whether the loss weighs tokens by p of the trainer / p of the sampler itself.
    """

    aggregation: Aggregation
    needs_advantage = True
    resets_optimizer = False
    corrects_sampler = False

    def default_advantage(self) -> Advantage:
        """Return the advantage that the method's paper uses."""
        return ZScore()

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


class GSPOToken(GSPO):
    """GSPO whose advantages may differ between the tokens of a completion: s_t = sg[s] p_t / sg[p_t], clipped like s.

    sg keeps a value without its gradient. Source: arXiv 2507.18071, section 4.3. With one advantage per completion the
    loss and the gradient are those of ``GSPO``. Metrics: those of ``Clipped``, over tokens.

    Args:
        clip_low: >= 0.
        clip_high: >= 0.
    """

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        advantages = take_advantages(logprobs, batch)
        whole = masked_mean(log_ratio, mask, dim=-1).detach()[:, None]  # log s, [N, 1]
        ratio = (whole + log_ratio - log_ratio.detach()).masked_fill(advantages == 0, 0.0).exp()  # [N, Tc]
        losses = clip_losses(ratio, advantages, self.clip_low, self.clip_high)
        metrics = measure_clips(ratio, advantages, mask, self.clip_low, self.clip_high)
        loss = aggregate(losses, self.aggregation.weights(mask), batch["denominator"])
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


class REINFORCE(PolicyObjective):
    """-A logprob per token, without a ratio: the policy gradient of samples from the present policy (Williams, 1992).

    Further updates of a phase are off-policy and not corrected. The default advantage is reward - mean of the group.
    Metrics: ``approx_kl``.

    Args:
        aggregation: default ``SequenceSum``.
    """

    def __init__(self, aggregation: Aggregation | None = None) -> None:
        self.aggregation = aggregation or SequenceSum()

    def default_advantage(self) -> Advantage:
        return Centered()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask = batch["completion_mask"]
        losses = -take_advantages(logprobs, batch) * logprobs
        loss = aggregate(losses, self.aggregation.weights(mask), batch["denominator"])
        return loss, {"approx_kl": measure_kl(take_log_ratio(logprobs, batch), mask)}


class RLOO(PolicyObjective):
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per completion, whose ratio is a product over tokens.

    Then the mean over completions. At ratio 1, in the first update of a phase, that is the policy gradient of arXiv
    2402.14740; the ratio of whole completions and its clip are TRL's, for further updates. A product over many tokens
    leaves the bounds soon. The default advantage is ``LeaveOneOut``; the paper has its KL in the reward (``kl_loss:
    null``). Metrics: those of ``Clipped``, with ``clip_ratio/*`` over completions.

    Args:
        clip_low: >= 0.
        clip_high: >= 0.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2) -> None:
        check_numbers("RLOO", clip_low=(clip_low, "[0, inf)"), clip_high=(clip_high, "[0, inf)"))
        self.clip_low, self.clip_high, self.aggregation = clip_low, clip_high, SequenceSum()

    def default_advantage(self) -> Advantage:
        return LeaveOneOut()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        keep = mask.any(-1)  # [N]
        advantages = masked_mean(take_advantages(logprobs, batch), mask, dim=-1)  # [N]
        ratio = log_ratio.sum(-1).masked_fill(advantages == 0, 0.0).exp()  # [N]
        losses = clip_losses(ratio, advantages, self.clip_low, self.clip_high)
        metrics = measure_clips(ratio, advantages, keep, self.clip_low, self.clip_high)
        loss = aggregate(losses, keep, batch["denominator"])
        return loss, metrics | {"approx_kl": measure_kl(log_ratio, mask)}


class REINFORCEPlusPlus(Clipped):
    """The loss of ``Clipped`` on advantages that are whitened over the phase: REINFORCE++, arXiv 2501.03262.

    Without a baseline the paper has its KL in the reward (``kl_loss: null``), and one completion per prompt suffices;
    with one, it has its KL in the loss, as ``kl_loss: k2``. Metrics: those of ``Clipped``.

    Args:
        baseline: first subtract the mean reward of the group.
        clip_low: >= 0.
        clip_high: >= 0.
        aggregation: default ``TokenMean``.
    """

    def __init__(
        self,
        baseline: bool = False,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: Aggregation | None = None,
    ) -> None:
        super().__init__(clip_low, clip_high, aggregation=aggregation)
        self.baseline = baseline

    def default_advantage(self) -> Advantage:
        return Whitened(self.baseline)


class SAPO(PolicyObjective):
    """-(4 / tau) sigmoid(tau (ratio - 1)) A per token: a soft gate in place of the clip (SAPO, arXiv 2511.20347).

    Its gradient is the policy gradient times 4 s (1 - s) ratio, with s the sigmoid: whole at ratio 1, and fading away
    from it. tau is larger for A < 0, where gradients raise many other tokens. Metrics: ``approx_kl``, and ``gate``, the
    mean of 4 s (1 - s).

    Args:
        tau_positive: > 0, for A > 0.
        tau_negative: > 0, for A < 0.
        aggregation: default ``SequenceMean``, as published.
    """

    def __init__(
        self, tau_positive: float = 1.0, tau_negative: float = 1.05, aggregation: Aggregation | None = None
    ) -> None:
        check_numbers("SAPO", tau_positive=(tau_positive, "(0, inf)"), tau_negative=(tau_negative, "(0, inf)"))
        self.tau_positive, self.tau_negative = tau_positive, tau_negative
        self.aggregation = aggregation or SequenceMean()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        advantages = take_advantages(logprobs, batch)
        tau = torch.full_like(advantages, self.tau_negative).masked_fill(advantages > 0, self.tau_positive)
        # The gate is flat long before exp overflows, and inf x 0 would be NaN in the gradient.
        gate = torch.sigmoid(tau * torch.expm1(log_ratio.clamp(max=20.0)))  # [N, Tc]
        losses = -4 / tau * gate * advantages
        loss = aggregate(losses, self.aggregation.weights(mask), batch["denominator"])
        open_by = masked_mean((4 * gate * (1 - gate)).detach(), mask)
        return loss, {"gate": open_by, "approx_kl": measure_kl(log_ratio, mask)}


class DPPO(PolicyObjective):
    """-keep min(ratio, cap) A logprob per token, with ratio = p / q and q the probability with which it was drawn.

    keep drops a token once p is more than ``delta`` away from q to the side where A pushes it: p - q > delta for A > 0,
    p - q < -delta for A < 0. That bounds the total variation of the token against all others, and leaves unlikely
    tokens the room that a clip of the ratio takes from them (DPPO with binary TV, arXiv 2602.04879). keep and
    min(ratio, cap) have no gradient. The ratio corrects for the sampler, so ``importance`` beside it is refused.
    Metrics: ``dropped``, the share of tokens that keep drops; ``approx_kl``.

    Args:
        delta: (0, 1].
        cap: > 0, largest weight, as in verl.
        aggregation: default ``TokenMean``.
    """

    corrects_sampler = True

    def __init__(self, delta: float = 0.2, cap: float = 20.0, aggregation: Aggregation | None = None) -> None:
        check_numbers("DPPO", delta=(delta, "(0, 1]"), cap=(cap, "(0, inf)"))
        self.delta, self.cap, self.aggregation = delta, cap, aggregation or TokenMean()

    def __call__(self, logprobs: Tensor, batch: PolicyBatch) -> tuple[Tensor, Metrics]:
        mask, log_ratio = batch["completion_mask"], take_log_ratio(logprobs, batch)
        advantages = take_advantages(logprobs, batch)
        sampled = batch["sampler_logprobs"].masked_fill(~mask, 0.0)
        now = logprobs.detach().masked_fill(~mask, 0.0)
        weight = (now - sampled).exp().clamp(max=self.cap)
        moved = now.exp() - sampled.exp()  # [N, Tc]
        drop = ((advantages > 0) & (moved > self.delta)) | ((advantages < 0) & (moved < -self.delta))
        losses = -weight.masked_fill(drop, 0.0) * advantages * logprobs
        loss = aggregate(losses, self.aggregation.weights(mask), batch["denominator"])
        return loss, {"dropped": masked_mean(drop, mask), "approx_kl": measure_kl(log_ratio, mask)}


class MirrorDescent(PolicyObjective):
    """-(r - mean of the group's r) l + tau/2 (l - l_old)^2 per completion, l the sum of its log-probs; then the mean.

    Source: Kimi k1.5, arXiv 2501.12599, section 2.3.2, eq. 3, with the mean reward in place of tau log Z. The reference
    of the square is the policy that sampled the phase, so the square is 0 at a phase's first update. As in the paper,
    the optimizer's moments are reset at the start of each phase, since each phase is a problem of its own. Metrics:
    ``approx_kl``.

    Args:
        tau: >= 0, strength of the tie to the sampling policy; the square grows like the length squared, so keep it
            small (the paper names no number).
        reset_optimizer: False keeps the optimizer's moments from phase to phase. Without a past, Adam's first update
            moves every weight by the learning rate, whatever the size of its gradient, so take a third of the learning
            rate of other objectives.
    """

    needs_advantage = False

    def __init__(self, tau: float = 0.01, reset_optimizer: bool = True) -> None:
        check_numbers("MirrorDescent", tau=(tau, "[0, inf)"))
        self.tau, self.resets_optimizer, self.aggregation = tau, reset_optimizer, SequenceSum()

    def default_advantage(self) -> Advantage:
        return Centered()

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
        ValueError: a value is out of range.
    """

    ratio: float = 0.2  # >= 0, of the probability ratio, see Clipped
    dual: float | None = None  # > 1, see Clipped
    value: float | None = 0.2  # > 0, of a value from the one at collection, see ClippedValue

    def __post_init__(self) -> None:
        check_numbers(
            "clip", ratio=(self.ratio, "[0, inf)"), dual=(self.dual, "(1, inf)"), value=(self.value, "(0, inf)")
        )


def leave_out_unscored(batch: PolicyBatch) -> PolicyBatch:
    """Drop completions that teach nothing from the batch's ``completion_mask``: those without a score, and those that
    ``teaches`` leaves out.
    """
    mask = batch["completion_mask"] & batch.get("teaches", ~batch["rewards"].isnan())[:, None]
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
